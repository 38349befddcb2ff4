"""Dataflow between the modules of a network, from symbolic traces of their forwards."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator

from torch import fx, nn

# Files of torch.nn, and functions, that keep the number of dimensions of their input.
_RANK_PRESERVING_LAYERS = {"activation", "batchnorm", "dropout", "padding", "pooling"}
_RANK_PRESERVING_FUNCTIONS = {
    *("dropout", "elu", "gelu", "leaky_relu", "relu", "relu_", "silu", "tanh")
}


class Dataflow:
    """Calls between the modules of a network: whose output enters whose input.

    `torch.fx` traces the forward of each module by itself; the modules that it calls are opaque and
    nothing is computed. Some forwards cannot be traced, for example those that branch on a value or
    on a shape. Nothing is known of the modules that such a forward calls, see `find_untraced`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._calls: dict[int, list[fx.Node]] = {}
        self._called: dict[fx.Node, nn.Module] = {}
        self._readers: dict[int, nn.Module] = {}
        self._untraced_callers: dict[int, nn.Module] = {}
        self._untraced_ancestors: dict[int, nn.Module] = {}
        for owner in model.modules():
            if next(owner.children(), None) is not None and _defines_forward(owner):
                self._record_calls(owner)

    def _record_calls(self, owner: nn.Module) -> None:
        graph = _trace(owner)
        if graph is None:
            self._untraced_callers |= {id(module): owner for module in _iter_callees(owner)}
            self._untraced_ancestors |= {id(module): owner for module in owner.modules()}
            return
        for node in graph.nodes:
            if node.op == "call_module":
                self._called[node] = module = owner.get_submodule(node.target)
                self._calls.setdefault(id(module), []).append(node)
            elif node.op == "get_attr" and "." in node.target:  # a tensor, used without its module
                module = owner.get_submodule(node.target.rpartition(".")[0])
                self._readers[id(module)] = owner

    def find_untraced_caller(self, module: nn.Module) -> nn.Module | None:
        """Return the module that calls this one in a forward that cannot be traced, if any."""
        return self._untraced_callers.get(id(module))

    def find_untraced_ancestor(self, *modules: nn.Module) -> nn.Module | None:
        """Return an ancestor of any of the modules whose forward cannot be traced, if any.

        Such a forward may call modules at any depth, in addition to the calls that traces show.
        """
        ancestors = (self._untraced_ancestors.get(id(module)) for module in modules)
        return next((ancestor for ancestor in ancestors if ancestor is not None), None)

    def find_reader(self, module: nn.Module) -> nn.Module | None:
        """Return a module whose traced forward uses tensors of this one by name, if any."""
        return self._readers.get(id(module))

    def find_exclusive_source(self, module: nn.Module) -> nn.Module | None:
        """Return the module whose output enters this one and nothing else.

        Both are called exactly once, and no hook stands between them. For a Sequential, its last
        module is returned. None: there is no such module.
        """
        call = self._find_call(module)
        if call is None or len(call.all_input_nodes) != 1 or module._forward_pre_hooks:
            return None
        source: fx.Node | None = call.all_input_nodes[0]
        while source is not None and len(source.users) == 1:
            producer = self._called.get(source)
            if producer is None or self._find_call(producer) is not source:
                return None
            if producer._forward_hooks:
                return None
            if (last := _find_last(producer)) is None:
                return producer
            source = self._find_call(last)
        return None

    def find_origin(self, module: nn.Module) -> nn.Module | None:
        """Return the module that set the number of dimensions of this one's input, if traced."""
        call = self._find_call(module)
        while call is not None and len(call.all_input_nodes) == 1:
            call = call.all_input_nodes[0]
            producer = self._called.get(call)
            while (last := _find_last(producer)) is not None:
                call = self._find_call(last)
                producer = None if call is None else self._called.get(call)
            if call is None or not _preserves_rank(call, producer):
                return producer
        return None

    def find_consumers(
        self, module: nn.Module, kinds: tuple[type[nn.Module], ...]
    ) -> list[nn.Module]:
        """Return the first modules of some kinds on every path of this one's output.

        The list is empty where a path leaves the calling forward without meeting one.
        """
        consumers: list[nn.Module] = []
        calls, seen = [self._find_call(module)], set[fx.Node]()
        while calls:
            call = calls.pop()
            if call is None or call.op == "output":
                return []
            for user in call.users.keys() - seen:
                seen.add(user)
                if isinstance(self._called.get(user), kinds):
                    consumers.append(self._called[user])
                else:
                    calls.append(user)
        return consumers

    def find_inplace_function(self, module: nn.Module) -> str | None:
        """Return the name of a function that works in place on this module's output, if any."""
        call = self._find_call(module)
        for user in call.users if call is not None else ():
            name = getattr(user.target, "__name__", str(user.target))
            functional = user.op in ("call_function", "call_method")
            if functional and (user.kwargs.get("inplace") or name.endswith("_")):
                return name
        return None

    def _find_call(self, module: nn.Module) -> fx.Node | None:
        """Return the only call of the module; None if it may have another number of calls."""
        calls = self._calls.get(id(module), [])
        unsure = id(module) in self._untraced_callers or id(module) in self._readers
        return calls[0] if len(calls) == 1 and not unsure else None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(owner: nn.Module) -> fx.Graph | None:
    """Trace the owner's forward in evaluation, with the defaults of all optional arguments."""
    if "forward" in vars(owner):  # fx would trace the forward of the class instead
        return None
    try:
        probe = copy.copy(owner)  # receives the attributes that forward may set
        probe.training = False
        parameters = inspect.signature(probe.forward).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _Tracer().trace(probe, concrete_args=defaults)
    except Exception:  # foreign code may raise anything when it meets symbolic values
        return None


def _defines_forward(module: nn.Module) -> bool:
    """Tell modules from mere containers, such as ModuleList, whose parent calls their children."""
    return getattr(type(module), "forward", None) is not nn.Module.forward  # torch.jit has none


def _iter_callees(owner: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that the owner's forward is expected to call itself."""
    for child in owner.children():
        yield child
        if not _defines_forward(child):
            yield from _iter_callees(child)


def _find_last(module: nn.Module | None) -> nn.Module | None:
    """Return the module whose output a Sequential returns; None for any other module."""
    if module is None or getattr(type(module), "forward", None) is not nn.Sequential.forward:
        return None
    return next(reversed(list(module.children())), None)


def _preserves_rank(call: fx.Node, module: nn.Module | None) -> bool:
    """Tell whether the output of a call has as many dimensions as its input."""
    if module is not None:
        package, _, file = type(module).__module__.rpartition(".")
        return package == "torch.nn.modules" and file in _RANK_PRESERVING_LAYERS
    return getattr(call.target, "__name__", call.target) in _RANK_PRESERVING_FUNCTIONS
