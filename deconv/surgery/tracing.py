"""Dataflow between the modules of a network, from symbolic traces of their forwards."""

from __future__ import annotations

import copy
import inspect
import operator
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, product
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from .batchnorm import is_batchnorm, is_known_batchnorm
from .fuse import copy_around

# Files of torch.nn, and functions, whose output has as many dimensions as their input.
_RANK_PRESERVING_LAYERS = {"activation", "batchnorm", "dropout", "padding", "pooling"}
_RANK_PRESERVING_FUNCTIONS = {
    *("dropout", "elu", "gelu", "leaky_relu", "relu", "relu_", "silu", "tanh")
}
_MAX_TRACES = 32  # of one forward
_SYMBOL = object()  # marks an argument that is traced with a symbolic value
_EXAMPLE = torch.empty(0)
# Products of two values, of which one gates the other.
_GATES = {"mul", "imul", "matmul", "bmm", "einsum", "scaled_dot_product_attention"}


class Dataflow:
    """Graph of the calls between the modules of a network.

    `torch.fx` traces the forward of each module separately. Called modules are opaque, and nothing
    is computed. A forward cannot be traced if it branches on a value or a shape, for example.
    The calls of such a forward are unknown, see `find_untraced_caller`.

    Traces run on a copy of the model, because forwards may change buffers and attributes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._calls: dict[int, list[fx.Node]] = {}
        self._called: dict[fx.Node, nn.Module] = {}
        self._callers: dict[fx.Graph, nn.Module] = {}
        self._readers: dict[int, nn.Module] = {}
        self._untraced_callers: dict[int, nn.Module] = {}
        self._untraced_ancestors: dict[int, nn.Module] = {}
        self._branching_callers: dict[int, nn.Module] = {}
        self._class_dependent_callers: dict[int, nn.Module] = {}
        with _keep_global_state():
            twin = _copy_to_trace(model)
            twins = dict(twin.named_modules(remove_duplicate=False))
            self._originals = {
                id(twins[name]): module for name, module in model.named_modules() if name in twins
            }
            traces = {
                owner: _trace_variants(owner) for owner in twin.modules() if _is_traced(owner)
            }
            for owner, graphs in traces.items():
                self._record_calls(owner, graphs[0])
            reached = _find_reached(twin, traces)
            for owner, graphs in traces.items():
                self._record_branches(owner, graphs, reached)
            for is_replaced in (_is_convolution, is_batchnorm):
                _replace_classes(twin, is_replaced)
                for owner, graphs in traces.items():
                    self._record_class_dependence(owner, graphs[0], is_replaced)

    def _record_calls(self, owner: nn.Module, graph: fx.Graph | None) -> None:
        """Record the calls of the owner's forward with default arguments."""
        caller = self._find_original(owner)
        if graph is None:
            self._untraced_callers |= {
                id(self._find_original(module)): caller for module in _iter_callees(owner)
            }
            self._untraced_ancestors |= {id(module): caller for module in caller.modules()}
            return
        self._callers[graph] = caller
        for node in graph.nodes:
            if node.op == "call_module":
                self._called[node] = module = self._find_original(owner.get_submodule(node.target))
                self._calls.setdefault(id(module), []).append(node)

    def _record_branches(
        self, owner: nn.Module, graphs: list[fx.Graph | None], reached: set[nn.Module]
    ) -> None:
        """Record modules that the owner may use differently with other arguments or attributes.

        If no trace reaches a layer with parameters or buffers, another path must exist.
        """
        if graphs[0] is None:
            return
        caller = self._find_original(owner)
        called = {module for graph in graphs for module in _iter_called(owner, graph)}
        idle = any(
            reached.isdisjoint(child.modules()) and called.isdisjoint(child.modules())
            for child in _iter_callees(owner)
            if any(True for _ in chain(child.parameters(), child.buffers()))
        )
        for sink in graphs[0].nodes:
            if not (sink in self._called and is_batchnorm(self._called[sink])):
                continue
            for source in sink.all_input_nodes:
                sure = not idle and all(
                    graph is not None and _keeps_edge(graph, source.target, sink.target)
                    for graph in graphs[1:]
                )
                if not sure:
                    self._branching_callers[id(self._called[sink])] = caller
        for module in called - set(_iter_called(owner, graphs[0])):
            self._branching_callers[id(self._find_original(module))] = caller
        for node in chain.from_iterable(graph.nodes for graph in graphs if graph is not None):
            if node.op == "get_attr" and "." in node.target:  # of an uncalled module
                module = owner.get_submodule(node.target.rpartition(".")[0])
                self._readers[id(self._find_original(module))] = caller

    def _record_class_dependence(
        self,
        owner: nn.Module,
        graph: fx.Graph | None,
        is_replaced: Callable[[nn.Module], bool],
    ) -> None:
        """Record the replaced modules of a forward that depends on their classes."""
        if graph is None:
            return
        caller = self._find_original(owner)
        callees = [self._called[node] for node in graph.nodes if node in self._called]
        replaced = [*filter(is_replaced, (*_iter_callees(caller), *callees))]
        if replaced and _format(_trace(owner)) != _format(graph):
            self._class_dependent_callers |= {id(module): caller for module in replaced}

    def _find_original(self, module: nn.Module) -> nn.Module:
        """Return the module of the model that corresponds to a module of the copy."""
        return self._originals.get(id(module), module)

    def find_untraced_caller(self, module: nn.Module) -> nn.Module | None:
        """Return the module whose untraced forward calls this module, or None."""
        return self._untraced_callers.get(id(module))

    def find_untraced_ancestor(self, *modules: nn.Module) -> nn.Module | None:
        """Return an ancestor of the modules whose forward cannot be traced, or None.

        Such a forward may call modules at any depth, in addition to the traced calls.
        """
        ancestors = (self._untraced_ancestors.get(id(module)) for module in modules)
        return next((ancestor for ancestor in ancestors if ancestor is not None), None)

    def find_branching_caller(self, *modules: nn.Module) -> nn.Module | None:
        """Return a module that may call the modules differently than in its trace, or None.

        The calls of its forward depend on arguments or attributes, or the trace misses a layer.
        """
        callers = (self._branching_callers.get(id(module)) for module in modules)
        return next((caller for caller in callers if caller is not None), None)

    def find_class_dependent_caller(self, module: nn.Module) -> nn.Module | None:
        """Return the module that calls this module in a class-dependent forward, or None."""
        return self._class_dependent_callers.get(id(module))

    def find_reader(self, module: nn.Module) -> nn.Module | None:
        """Return a module whose traced forward reads tensors of this module by name, or None."""
        return self._readers.get(id(module))

    def find_exclusive_source(self, module: nn.Module) -> nn.Module | None:
        """Return the module whose output is used by this module only, or None.

        Both modules are called exactly once, and no hook runs between them. If a Sequential
        precedes, the result is its last module.
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
        """Return the module that set the number of dimensions of this module's input, or None."""
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
    ) -> tuple[list[nn.Module], bool]:
        """Return the first modules of the given classes on all paths of this module's output.

        Paths lead into and out of modules whose forward is traced.

        Returns:
            The modules; and True if there are some, and all paths meet one before they leave the
            calling forward.
        """
        consumers: list[nn.Module] = []
        calls, seen, entered = [self._find_call(module)], set[fx.Node](), set[nn.Module]()
        is_complete = True
        while calls:
            call = calls.pop()
            if call is None:
                is_complete = False
                continue
            for user in [user for user in call.users if user not in seen]:
                seen.add(user)
                called = self._called.get(user)
                if user.op == "output":
                    caller = self._callers[user.graph]
                    is_complete &= caller in entered
                    calls.append(self._find_call(caller))
                elif isinstance(called, kinds):
                    consumers.append(self._called[user])
                elif called is not None and any(isinstance(m, kinds) for m in called.modules()):
                    entered.add(called)
                    calls.extend(self._list_inputs(called) or [user])
                else:
                    calls.append(user)
        return consumers, is_complete and bool(consumers)

    def _list_inputs(self, module: nn.Module) -> list[fx.Node]:
        """Return the arguments in the trace of the module's forward; none without a trace."""
        graphs = [graph for graph, caller in self._callers.items() if caller is module]
        return [node for graph in graphs for node in graph.nodes if node.op == "placeholder"]

    def is_returned(self, module: nn.Module) -> bool | None:
        """Return True if the model returns this module's output, without further weights or gates.

        The output may pass functions and modules without parameters. The result is None if a
        forward on the path cannot be traced, or does not call the module exactly once.
        """
        while module is not self._model:
            call = self._find_call(module)
            if call is None or not self._is_returned_by_caller(call):
                return None if call is None else False
            module = self._callers[call.graph]
        return True

    def _is_returned_by_caller(self, call: fx.Node) -> bool:
        """Return True if the calling forward returns the output of a call, see `is_returned`."""
        calls, seen = [call], set[fx.Node]()
        while calls:
            for user in calls.pop().users.keys() - seen:
                seen.add(user)
                inputs = [node for node in user.all_input_nodes if node.op != "get_attr"]
                module = self._called.get(user)
                if module is not None and any(True for _ in module.parameters()):
                    return False
                name = getattr(user.target, "__name__", user.target)
                if len(inputs) > 1 and (module is not None or name in _GATES):
                    return False
                calls.append(user)
        return any(user.op == "output" for user in seen)

    def find_inplace_function(self, module: nn.Module) -> str | None:
        """Return the name of a function that changes this module's output in place, or None.

        The function may be in another traced forward, unless only this module uses its input.
        Modules with an attribute `inplace` do not count, since `convert` switches it off.
        """
        calls, exclusive = [self._find_call(module)], self.find_exclusive_source(module) is not None
        while calls:
            call = calls.pop()
            for user in call.users if call is not None else ():
                called = self._called.get(user)
                if user.op == "output" and not exclusive:
                    calls.append(self._find_call(self._callers[user.graph]))
                elif not (called is None or hasattr(called, "inplace") or exclusive):
                    calls.extend(self._list_inputs(called))
                name = getattr(user.target, "__name__", str(user.target))
                functional = user.op in ("call_function", "call_method")
                if functional and (user.kwargs.get("inplace") or name.endswith("_")):
                    return name
        return None

    def _find_call(self, module: nn.Module) -> fx.Node | None:
        """Return the call of the module; None unless it is called exactly once."""
        calls = self._calls.get(id(module), [])
        unsure = id(module) in self._untraced_callers or id(module) in self._readers
        return calls[0] if len(calls) == 1 and not unsure else None


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # record reads of buffers, as of parameters

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _is_traced(module: nn.Module) -> bool:
    """Return True if the module has a forward of its own, not one of a layer."""
    has_children = next(module.children(), None) is not None
    tensors = chain(module.parameters(), module.buffers())
    is_function = next(tensors, None) is None and not type(module).__module__.startswith("torch.nn")
    own = (has_children or is_function) and _defines_forward(module)
    return own and not (is_batchnorm(module) and is_known_batchnorm(module))


@contextmanager
def _keep_global_state() -> Iterator[None]:
    """Restore the random state of Python, numpy and torch, and the gradient mode, on exit."""
    numpy = sys.modules.get("numpy")
    state = random.getstate(), numpy and numpy.random.get_state()
    accelerator = torch.get_device_module()  # torch.cpu without one
    started = getattr(accelerator, "is_initialized", lambda: False)()
    devices = range(accelerator.device_count() if started else 0)
    kind = accelerator.__name__.rpartition(".")[2]
    try:
        with (
            torch.random.fork_rng(devices, device_type=kind),
            torch.set_grad_enabled(torch.is_grad_enabled()),
        ):
            yield
    finally:
        random.setstate(state[0])
        if numpy:
            numpy.random.set_state(state[1])


@torch.no_grad()
def _copy_to_trace(model: nn.Module) -> nn.Module:
    """Copy a model in evaluation mode, also with FakeTensors, which deepcopy cannot copy."""
    copies: dict[int, Any] = {id(buffer): buffer.clone() for buffer in model.buffers()}
    for parameter in model.parameters():
        if not nn.parameter.is_lazy(parameter):
            copies[id(parameter)] = nn.Parameter(parameter.clone(), parameter.requires_grad)
    twin = copy_around(model, copies)
    for module in twin.modules():
        module.training = False
    return twin


def _is_convolution(module: nn.Module) -> bool:
    """Return True if a module is a convolution of torch or of a subclass."""
    return isinstance(module, _ConvNd)


def _replace_classes(model: nn.Module, is_replaced: Callable[[nn.Module], bool]) -> None:
    """Replace modules as `convert` does: by a subclass of torch's convolution, or an Identity."""
    replaced: dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()):
        for name, child in module.named_children():
            if not is_replaced(child):
                continue
            kinds = [kind for kind in type(child).__mro__ if kind.__module__ == _ConvNd.__module__]
            if kinds:
                child.__class__ = type("Replacement", (kinds[0],), {})
            else:
                setattr(module, name, replaced.setdefault(child, nn.Identity()))


def _trace_variants(owner: nn.Module) -> list[fx.Graph | None]:
    """Trace the owner's forward with default arguments, then with other arguments and attributes.

    A flag is traced as True and as False. Other optional arguments are traced with the default and
    symbolically. Required arguments after the first are traced symbolically, and with None if the
    forward accepts None. Attributes that are flags, strings, numbers or None get other values, one
    at a time, if the forward accepts them. A module without convolutions and BatchNorms inside is
    traced only once.

    Returns:
        The trace with default arguments first; None for each trace that fails.
    """
    read = set[str]()
    graphs = [_trace(owner, read=read)]
    if graphs[0] is None or type(owner).forward.__module__.startswith("torch.nn."):
        return graphs
    if not any(_is_convolution(module) or is_batchnorm(module) for module in owner.modules()):
        return graphs
    parameters = _list_parameters(owner)
    options: list[tuple[Any, ...]] = []
    for parameter in parameters:
        if isinstance(parameter.default, bool):
            options.append((True, False))
        else:
            default = None if parameter.default is parameter.empty else parameter.default
            options.append((_SYMBOL, default) if options else (_SYMBOL,))
    combinations = list(product(*options)) if 2 ** len(options) <= _MAX_TRACES else []
    if not combinations:
        graphs.append(None)
    for values in combinations[len(combinations) == 1 :]:
        given = list(zip(parameters, values, strict=True))
        graph = _trace(owner, {p.name: value for p, value in given if value is not _SYMBOL})
        if graph is not None or not any(v is None and p.default is p.empty for p, v in given):
            graphs.append(graph)
    forward = type(owner).forward
    others = []
    if isinstance(forward, FunctionType) and "isinstance" in _iter_names(forward.__code__):
        others.append(_trace(_count_as_tensors(owner, forward)))
    for name in read.difference(dir(nn.Module)):
        for value in _vary(inspect.getattr_static(owner, name, _SYMBOL)):
            probe = copy.copy(owner)
            setattr(probe, name, value)
            others.append(_trace(probe))
    return graphs + [graph for graph in others if graph is not None]


def _iter_names(code: CodeType) -> Iterator[str]:
    """Yield the global names and attributes that code uses, with the functions inside it."""
    yield from code.co_names
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _iter_names(value)


def _count_as_tensors(owner: nn.Module, forward: FunctionType) -> nn.Module:
    """Return a copy of the owner in whose forward `isinstance` treats proxies as tensors."""
    names = {**forward.__globals__, "isinstance": _is_instance}
    given = (forward.__name__, forward.__defaults__, forward.__closure__)
    own = FunctionType(forward.__code__, names, *given)
    own.__kwdefaults__ = forward.__kwdefaults__
    probe = copy.copy(owner)
    probe.__class__ = type(type(owner).__name__, (type(owner),), {"forward": own})
    return probe


def _is_instance(value: Any, kinds: Any) -> bool:
    return isinstance(_EXAMPLE if isinstance(value, fx.Proxy) else value, kinds)


def _vary(value: object) -> Iterator[object]:
    """Yield other values of an attribute: one that inverts comparisons, and a smaller integer."""
    if isinstance(value, bool | None):
        yield not value
    elif isinstance(value, str | int | float):
        kind: type[Any] = type(value)

        def negate(test: Callable[..., bool]) -> Callable[..., bool]:
            return lambda self, *other: not test(kind(self), *other)

        names = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
        methods = {name: negate(getattr(operator, name)) for name in names}
        methods["__bool__"] = negate(operator.truth)
        yield type(kind.__name__, (kind,), {**methods, "__hash__": kind.__hash__})(value)
        if isinstance(value, int):
            yield value - 1  # a count of layers


def _record_reads(probe: nn.Module, read: set[str]) -> None:
    """Make a module record the name of each attribute that its forward reads."""

    def get(self: nn.Module, name: str) -> Any:
        read.add(name)
        return kind.__getattribute__(self, name)

    kind = type(probe)
    probe.__class__ = type(kind.__name__, (kind,), {"__getattribute__": get})


def _list_parameters(owner: nn.Module) -> list[inspect.Parameter]:
    """List the parameters of the owner's forward, without *args and **kwargs."""
    parameters = inspect.signature(owner.forward).parameters.values()
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _trace(
    owner: nn.Module,
    arguments: Mapping[str, Any] | None = None,
    read: set[str] | None = None,
) -> fx.Graph | None:
    """Trace the owner's forward with constant arguments, the defaults unless given.

    Args:
        owner: the module.
        arguments: values by name; other arguments are symbolic. None: the defaults.
        read: receives the names of the attributes that the forward reads.
    """
    own_call = type(owner).__call__ is not nn.Module.__call__ and not isinstance(
        owner, fx.GraphModule
    )
    if "forward" in vars(owner) or own_call:  # fx would trace the forward of the class instead
        return None
    try:
        probe = copy.copy(owner)  # receives the attributes that forward may set
        if arguments is None:
            parameters = _list_parameters(probe)
            arguments = {p.name: p.default for p in parameters if p.default is not p.empty}
        if read is not None:
            _record_reads(probe, read)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Tracer().trace(probe, concrete_args=dict(arguments))
            _record_stored(probe, graph)
            return graph
    except Exception:  # foreign code may raise anything when it meets symbolic values
        return None


def _record_stored(probe: nn.Module, graph: fx.Graph) -> None:
    """Record a use of each value that the forward stores in an attribute, for other code."""

    def record(value: Any) -> Any:
        if isinstance(value, fx.Proxy) and value.node.graph is graph:
            with graph.inserting_before(graph.output_node()):
                graph.call_function(_stored, (value.node,))
        return value

    fx.node.map_aggregate(list(vars(probe).values()), record)


def _stored(value: Any) -> None:
    """Represent, in a graph, other code that uses a stored value."""


def _format(graph: fx.Graph | None) -> str:
    """Return a string that is equal for equal graphs."""
    nodes = graph.nodes if graph is not None else ()
    return "\n".join(f"{n.op} {n.target} {n.args} {n.kwargs}" for n in nodes)


def _iter_called(owner: nn.Module, graph: fx.Graph | None) -> Iterator[nn.Module]:
    """Yield the modules that a trace of the owner's forward calls."""
    for node in graph.nodes if graph is not None else ():
        if node.op == "call_module":
            yield owner.get_submodule(node.target)


def _find_reached(
    root: nn.Module, traces: Mapping[nn.Module, list[fx.Graph | None]]
) -> set[nn.Module]:
    """Return the modules that the root calls, directly or indirectly, in any trace."""
    reached, todo = set[nn.Module](), [root]
    while todo:
        owner = todo.pop()
        if owner not in reached:
            reached.add(owner)
            for graph in traces.get(owner, ()):
                callees = owner.modules() if graph is None else _iter_called(owner, graph)
                todo.extend(callees)
    return reached


def _keeps_edge(graph: fx.Graph, source: str, sink: str) -> bool:
    """Return True if a trace passes source to sink exclusively and once, or calls neither."""
    sources, sinks = (
        [node for node in graph.nodes if f"{node.target}.".startswith(f"{name}.")]
        for name in (source, sink)
    )
    if len(sources) != 1 or len(sinks) != 1:
        return not sources and not sinks
    return sinks[0].all_input_nodes == sources and [*sources[0].users] == sinks


def _defines_forward(module: nn.Module) -> bool:
    """Return False for containers such as ModuleList, whose parent calls their children."""
    return getattr(type(module), "forward", None) is not nn.Module.forward  # torch.jit has none


def _iter_callees(owner: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that the owner's forward is expected to call itself."""
    for child in owner.children():
        yield child
        if not _defines_forward(child):
            yield from _iter_callees(child)


def _find_last(module: nn.Module | None) -> nn.Module | None:
    """Return the last module of a Sequential; None for any other module."""
    if module is None or getattr(type(module), "forward", None) is not nn.Sequential.forward:
        return None
    return next(reversed(list(module.children())), None)


def _preserves_rank(call: fx.Node, module: nn.Module | None) -> bool:
    """Return True if the output of a call has as many dimensions as its input."""
    if module is not None:
        package, _, file = type(module).__module__.rpartition(".")
        return package == "torch.nn.modules" and file in _RANK_PRESERVING_LAYERS
    return getattr(call.target, "__name__", call.target) in _RANK_PRESERVING_FUNCTIONS
