"""Which module's output goes to which: read from the code of a network, without running it."""

from __future__ import annotations

import copy
import dis
import inspect
import warnings
from itertools import pairwise
from types import CodeType

from torch import fx, nn

# Files of torch.nn, and functions.
_SHAPELESS_LAYERS = {"activation", "batchnorm", "dropout", "padding", "pooling"}
_SHAPELESS_FUNCTIONS = {"dropout", "elu", "gelu", "leaky_relu", "relu", "relu_", "silu", "tanh"}
_TENSORS = {"weight", "bias", "running_mean", "running_var"}  # of a BatchNorm


class Dataflow:
    """The calls of modules in a network, as far as the code of those that call them tells.

    The forward of each module is traced by itself, and everything that it calls is opaque. Where
    that is impossible (forward looks at values or shapes), nothing is known of its children, nor of
    what is within them under names that its code mentions, but whose tensors it reads by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._calls: dict[int, list[fx.Node | None]] = {}  # None: nobody knows how often and where
        self._called: dict[fx.Node, nn.Module] = {}
        self._readers: dict[int, nn.Module] = {}
        for owner in model.modules():
            if next(owner.children(), None) is not None and _has_forward(owner):
                self._read(owner)

    def _read(self, owner: nn.Module) -> None:
        graph = _trace(owner)
        if graph is None:
            mentioned, read = _find_names(type(owner)), _find_read(type(owner))
            for path, module in owner.named_modules():
                first, *deeper = path.split(".")
                if first and mentioned.issuperset("[]" if d.isdecimal() else d for d in deeper):
                    self._calls.setdefault(id(module), []).append(None)
                    if path.rpartition(".")[2] in read:
                        self._readers[id(module)] = owner
            return
        for node in graph.nodes:
            if node.op == "call_module":
                self._called[node] = module = owner.get_submodule(node.target)
                self._calls.setdefault(id(module), []).append(node)
            elif node.op == "get_attr" and "." in node.target:  # a weight, used without its module
                module = owner.get_submodule(node.target.rpartition(".")[0])
                self._calls.setdefault(id(module), []).append(None)
                self._readers[id(module)] = owner

    def find_reader(self, module: nn.Module) -> nn.Module | None:
        """The module whose code uses tensors of this one by themselves, if any is known to."""
        return self._readers.get(id(module))

    def _find_call(self, module: nn.Module) -> fx.Node | None:
        """The one call of the module; None if there are several, or maybe others."""
        calls = self._calls.get(id(module), [])
        return calls[0] if len(calls) == 1 else None

    def find_source(self, module: nn.Module) -> nn.Module | None:
        """The module whose whole output goes to this one and nowhere else; both are called once.

        Where that is a Sequential it is the last one in it. None: there is no such module, the code
        does not tell, or a hook stands between the two.
        """
        call = self._find_call(module)
        if call is None or len(call.all_input_nodes) != 1 or module._forward_pre_hooks:
            return None
        (source,) = call.all_input_nodes
        while (producer := self._find_producer(source)) is not None:
            if producer._forward_hooks:
                return None
            if not _is_sequence(producer):
                return producer
            source = self._find_call(producer[-1])
        return None

    def _find_producer(self, call: fx.Node | None) -> nn.Module | None:
        """The module of a call, if it has no other call and its output one use."""
        producer = self._called.get(call)
        once = producer is not None and self._find_call(producer) is call and len(call.users) == 1
        return producer if once else None

    def find_maker(self, module: nn.Module) -> nn.Module | None:
        """The module that this one's input comes from, through layers that leave a map a map.

        None: the code does not tell.
        """
        call = self._find_call(module)
        while call is not None and len(call.all_input_nodes) == 1:
            (call,) = call.all_input_nodes
            while _is_sequence(maker := self._called.get(call)):
                call = self._find_call(maker[-1])
            if not _leaves_a_map(call, maker):
                return maker
        return None

    def find_targets(
        self, module: nn.Module, kinds: tuple[type[nn.Module], ...]
    ) -> list[nn.Module]:
        """The first modules of some kinds on all hooks that this one's output takes.

        Within the code that calls it: none where it may also leave that.
        """
        targets, calls, seen = [], [self._find_call(module)], set()
        while calls:
            call = calls.pop()
            if call is None or call.op == "output":
                return []
            for user in call.users.keys() - seen:
                seen.add(user)
                if isinstance(self._called.get(user), kinds):
                    targets.append(self._called[user])
                else:
                    calls.append(user)
        return targets

    def find_overwriter(self, module: nn.Module) -> str | None:
        """The function, if any, that works in place on this module's output.

        None where it is a module, or where the code does not tell.
        """
        call = self._find_call(module)
        for user in call.users if call is not None else ():
            name = getattr(user.target, "__name__", str(user.target))
            functional = user.op in ("call_function", "call_method")
            if functional and (user.kwargs.get("inplace") or name.endswith("_")):
                return name
        return None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _get_forward(module: nn.Module) -> object:
    """The function of the class; None where it has a forward that is no Python (torch.jit)."""
    return getattr(type(module), "forward", None)


def _is_sequence(module: nn.Module | None) -> bool:
    """Whether its output is that of the last module in it."""
    return module is not None and _get_forward(module) is nn.Sequential.forward and len(module) > 0


def _leaves_a_map(call: fx.Node | None, module: nn.Module | None) -> bool:
    """Whether what a call gives is a map if its input is one, and a vector if that is one."""
    if module is not None:
        home, _, kind = type(module).__module__.rpartition(".")
        return home == "torch.nn.modules" and kind in _SHAPELESS_LAYERS
    name = None if call is None else getattr(call.target, "__name__", call.target)
    return name in _SHAPELESS_FUNCTIONS


def _has_forward(module: nn.Module) -> bool:
    """Lists and dicts of modules have none: others call what is in them."""
    return _get_forward(module) is not nn.Module.forward


def _find_methods(kind: type[nn.Module]) -> list[CodeType]:
    """The code of all methods of a class and of its bases."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    methods = [f for base in bases for f in vars(base).values() if inspect.isfunction(f)]
    return [method.__code__ for method in methods]


def _with_inner(code: CodeType) -> list[CodeType]:
    """A function's code, and that of the functions and comprehensions in it."""
    inner = [const for const in code.co_consts if inspect.iscode(const)]
    return [code, *(each for one in inner for each in _with_inner(one))]


def _find_read(kind: type[nn.Module]) -> set[str]:
    """Names of modules whose tensors forward, or a method that it mentions, reads: `NAME.weight`.

    Not in other methods, as many a one fills the weights of its modules at the start.
    """
    read, mentioned, methods = set(), {"forward"}, _find_methods(kind)
    while now := [code for code in methods if code.co_name in mentioned]:
        methods = [code for code in methods if code not in now]
        for code in (each for method in now for each in _with_inner(method)):
            mentioned.update(code.co_names)
            steps = [s for s in dis.get_instructions(code) if s.opname != "EXTENDED_ARG"]
            loads = [step.argval if step.opname == "LOAD_ATTR" else None for step in steps]
            read.update(name for name, of_it in pairwise(loads) if name and of_it in _TENSORS)
    return read


def _find_names(kind: type[nn.Module]) -> set[str]:
    """The names in the methods of a class and of its bases; "[]" where they index anything."""
    names = set()
    for code in (each for method in _find_methods(kind) for each in _with_inner(method)):
        names.update(code.co_names)
        if any(
            "SUBSCR" in step.opname or step.argrepr == "[]" for step in dis.get_instructions(code)
        ):
            names.add("[]")
    return names


def _trace(owner: nn.Module) -> fx.Graph | None:
    """What the owner's forward does in evaluation, with all options as they are by default."""
    if "forward" in vars(owner):  # put there by someone; the tracer would read that of the class
        return None
    try:
        probe = copy.copy(owner)  # whatever forward writes to attributes stays there
        probe.training = False
        parameters = inspect.signature(probe.forward).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _Tracer().trace(probe, concrete_args=defaults)
    except Exception:  # code of others that meets symbols may raise whatever it likes
        return None
