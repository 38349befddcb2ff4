"""Plan how `convert` treats each layer of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..conv import Convolution, FastDeconv, FastDeconv1d, FastDeconv3d, find_geometry
from ..conv_transpose import FastDeconvTranspose1d, FastDeconvTranspose2d, FastDeconvTranspose3d
from ..linear import Delinear
from ..ops.inverse_sqrt import find_linear_root
from ..table import align
from ..whitening import Whitening
from .batchnorm import count_dims, extra_modules, find_affine, is_batchnorm, is_known_batchnorm
from .fuse import refuse_wrapped
from .tracing import Dataflow

# The deconvolution that replaces each convolution of torch.
DECONVOLUTIONS: dict[type[nn.Module], type[Convolution]] = {
    kind.plain: kind
    for kind in (
        FastDeconv1d,
        FastDeconv,
        FastDeconv3d,
        FastDeconvTranspose1d,
        FastDeconvTranspose2d,
        FastDeconvTranspose3d,
    )
}

# Attributes of a convolution that decide what it computes.
_COMPUTING_NAMES = {"forward", "_conv_forward", "__call__", "__getattr__", "weight", "bias"}

REPLACED, KEPT, SKIPPED = "replaced", "kept", "skipped"
_KINDS = ("convolution", "norm", "linear layer", "TorchScript part")
_SMALL_SHARE = 0.05  # of all weights, below which whitening has little effect
_OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, _NormBase)


@dataclass(frozen=True)
class Row:
    """Planned treatment of one layer.

    Args:
        name: the first name of the layer in the model, "" for the model itself.
        module: the layer.
        action: "replaced", "kept" (no replacement is due) or "skipped" (an obstacle prevents it).
        becomes: description of the replacement.
        reason: reason for the action, with a remedy if there is one.
        layer: the replacement of a convolution or linear layer, on the meta device.
        partner: for a convolution, the BatchNorm that follows it and is folded into it; for a
            BatchNorm, that convolution.
        ends_model: for a linear layer, True if the model returns its output.
        dims: for a BatchNorm, the number of spatial dimensions of its input; 0: possibly vectors.
    """

    name: str
    module: Any = field(repr=False)
    action: str
    becomes: str = ""
    reason: str = ""
    layer: Any = field(default=None, repr=False)
    partner: nn.Module | None = field(default=None, repr=False)
    ends_model: bool = field(default=False, repr=False)
    dims: int = field(default=2, repr=False)

    @property
    def whitens(self) -> bool:
        """Return True if the layer is a deconvolution, or becomes one."""
        return self.layer is not None or isinstance(self.module, Whitening)


class Plan(tuple[Row, ...]):
    """Rows of a plan; `str` formats them as a table, with counts and the expected gain."""

    __slots__ = ()

    def __str__(self) -> str:
        lines = [("layer", "class", "action", "becomes", "reason")]
        for row in self:
            kind = type(row.module).__name__
            lines.append((row.name or "(all)", kind, row.action, row.becomes, row.reason))
        ends = filter(None, (self.count_kinds(), self.describe_outlook()))
        return "\n".join((align(lines), *ends))

    def count_kinds(self) -> str:
        """Return the number of convolutions, norms and linear layers per action."""
        texts = []
        for action in (REPLACED, KEPT, SKIPPED):
            kinds = Counter(_name_kind(row.module) for row in self if row.action == action)
            counts = [f"{kinds[kind]} {kind}{'s' * (kinds[kind] > 1)}" for kind in _KINDS]
            if present := [count for count in counts if not count.startswith("0 ")]:
                texts.append(f"{action}: {', '.join(present)}")
        return "; ".join(texts)

    def describe_outlook(self) -> str:
        """Return one sentence on the limits of the expected gain, or ""."""
        convs = [row for row in self if _name_kind(row.module) == "convolution"]
        norms = [row for row in self if _name_kind(row.module) == "norm"]
        whiten = [row for row in convs if row.whitens]
        if not whiten:
            return "No convolution is replaced, so no gain is expected." if convs else ""
        lost = any(row.action == REPLACED for row in norms)
        plain = [row for row in self if row.ends_model and row.layer is None]
        if lost and plain:
            foreign = any(not _is_plain_linear(row.module) for row in plain)
            remedy = "as an nn.Linear of torch" if foreign else "linear=True"
            return (
                f"Whiten {' and '.join(row.name for row in plain)} as well, {remedy}: "
                "without a norm before it, training at learning rates such as 0.1 diverges."
            )
        sizes = {row.name: row.module.weight.numel() for row in self if row not in norms}
        size = sum(sizes[row.name] for row in whiten)
        of_convs, of_all = size / sum(sizes[row.name] for row in convs), size / sum(sizes.values())
        if of_convs < 0.5:
            return (
                f"Convolutions with {1 - of_convs:.0%} of the weights stay, which limits the gain."
            )
        if of_all < _SMALL_SHARE:
            return f"Convolutions have {of_all:.1%} of the weights, which limits the gain."
        if lost or not any(row.layer for row in whiten):
            return ""
        kinds = sorted({type(row.module).__name__ for row in norms})
        stays = "stay" if len(kinds) > 1 else "stays"
        norm = f"{' and '.join(kinds)} {stays}" if norms else "The model has no norm"
        return f"{norm}: whitening adds to its cost, and larger learning rates may help."


def _name_kind(module: nn.Module) -> str:
    """Return the kind of a module, one of _KINDS, under which a plan counts it."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript part"
    if isinstance(module, nn.Linear):
        return "linear layer"
    return "convolution" if isinstance(module, _ConvNd) else "norm"


def plan(
    model: nn.Module,
    *,
    bias: bool = True,
    linear: bool | Iterable[str] = True,
    block_linear: int = 512,
    root_linear: str | None = None,
    pretrained: bool = False,
    skip: Iterable[str] = (),
    **options: Any,
) -> Plan:
    """Plan how `convert` treats each convolution, normalisation and linear layer of a model.

    Model and random state do not change, because a copy of the model is traced.

    Args:
        model: any model.
        bias: as in `convert`, like all further arguments (default True).
        linear: replace the linear layers that end the model (default True), or those whose names
            match a list of patterns.
        block_linear: maximum number of features that a Delinear whitens together (default 512).
        root_linear: root of a Delinear (default None: see `find_linear_root`).
        pretrained: keep the outputs of the model in evaluation (default False).
        skip: name patterns of layers to keep (default: none).
        **options: further keywords of FastDeconv.

    Returns:
        One row per layer, in the order of the model. The tuple prints as a table.

    Raises:
        ValueError, TypeError: as `convert`. A plan without a replacement is not an error.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        >>> print(plan(model))
        layer  class        action    becomes                              reason
        0      Conv2d       replaced  FastDeconv, blocks of 3, with a bias
        1      BatchNorm2d  replaced  Identity                             follows 0
        replaced: 1 convolution, 1 norm
    """
    refuse_wrapped(model, "Convert")
    _refuse_unknown_options(options)
    layers = {name: module for name, module in model.named_modules() if _is_planned(module)}
    skipped = _match_patterns(layers, skip, "skip")
    shared = signature(Delinear).parameters.keys() & options.keys() - {"block"}
    head_options = {name: options[name] for name in shared} | {"block": block_linear}
    head_options["root"] = find_linear_root(options.get("root", "cholesky"), root_linear)
    named = {} if isinstance(linear, bool) else _match_patterns(layers, linear, "linear")
    for name, module in layers.items():
        if (linear or not isinstance(module, nn.Linear)) and _is_lazy(module):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) has no shape yet: run the model "
                "on one batch first"
            )
    flow = Dataflow(model)
    rows: dict[int, Row] = {}
    for name, module in layers.items():
        if name in skipped:
            row = Row(
                name, module, SKIPPED, reason=f"matches the pattern {skipped[name]!r} of skip"
            )
        elif isinstance(module, torch.jit.ScriptModule):
            reason = "is TorchScript: convert the model before torch.jit.script"
            row = Row(name, module, SKIPPED, reason=reason)
        elif isinstance(module, Whitening):
            row = Row(name, module, KEPT, reason="is a deconvolution already")
        elif isinstance(module, _ConvNd):
            row = _plan_convolution(name, module, options)
            if row.action == REPLACED and (caller := flow.find_class_dependent_caller(module)):
                row = Row(name, module, SKIPPED, reason=_explain_classes(caller))
        elif isinstance(module, nn.Linear):
            row = Row(name, module, KEPT)  # planned below, after all convolutions
        elif not is_batchnorm(module):
            row = Row(name, module, KEPT, reason=_explain_norm(module))
        else:
            continue
        rows[id(module)] = row
    whitens = any(
        isinstance(row.module, Convolution) or isinstance(row.layer, Convolution)
        for row in rows.values()
    )
    for key, row in rows.items():
        if isinstance(row.module, nn.Linear):
            ends = flow.is_returned(row.module)
            known = row.reason or row.name in named
            reason = row.reason if known else _explain_linear(row.name, linear, ends, whitens)
            row = replace(row, reason=reason) if reason else _plan_linear(row, head_options)
            rows[key] = replace(row, ends_model=bool(ends))
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    tied = {key for key, count in uses.items() if count > 1}
    batchnorms = _BatchNormPlanner(layers, rows, flow, tied, pretrained)
    for name, module in layers.items():
        if id(module) not in rows:
            batchnorms.plan(name, module)
    if bias and any(row.action == REPLACED and row.layer is None for row in rows.values()):
        _add_biases(rows)
    return Plan(rows[id(module)] for module in layers.values())


def _refuse_unknown_options(options: Mapping[str, object]) -> None:
    """Raise TypeError for any option that is not a keyword of all deconvolutions."""
    parameters = signature(Convolution).parameters.values()
    known = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    for name in sorted(options.keys() - (known - {"device", "dtype"})):
        raise TypeError(f"convert() got an unexpected keyword argument {name!r}")


def _is_planned(module: nn.Module) -> bool:
    """Return True if a plan has a row for the module."""
    if isinstance(module, torch.jit.ScriptModule):  # its class hides the kind of layer
        return next(module.parameters(recurse=False), None) is not None
    return isinstance(module, (_ConvNd, nn.Linear, *_OTHER_NORMS)) or is_batchnorm(module)


def _match_patterns(
    layers: Iterable[str], patterns: Iterable[str], argument: str
) -> dict[str, str]:
    """Map the name of each layer that a pattern matches to this pattern."""
    if isinstance(patterns, str):
        raise ValueError(f"{argument} must be a list of patterns, got {patterns!r}")
    matches: dict[str, str] = {}
    for pattern in patterns:
        names = [name for name in layers if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(
                f"{argument}: no layer of the model matches {pattern!r}; print(deconv.plan(model)) "
                "lists the names"
            )
        matches |= dict.fromkeys(names, pattern)
    return matches


def _is_lazy(module: nn.Module) -> bool:
    """Return True if the first batch will set the shape of a layer."""
    tensors: Iterable[Any] = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(map(nn.parameter.is_lazy, tensors))


def _find_plain_class(conv: _ConvNd) -> type[nn.Module] | None:
    """Return the convolution of torch that a layer computes; None if the class overrides it."""
    kinds = type(conv).__mro__
    plain = next((kind for kind in kinds if kind in DECONVOLUTIONS), None)
    if plain is None or type(conv) is plain:
        return plain
    own = {name for kind in kinds[: kinds.index(plain)] for name in vars(kind)}
    state = {*conv._parameters, *conv._buffers, *conv._modules} - {"weight", "bias"}
    return None if state or own & _COMPUTING_NAMES else plain


def _plan_convolution(name: str, conv: _ConvNd, options: Mapping[str, Any]) -> Row:
    plain = _find_plain_class(conv)
    if plain is None:
        return Row(name, conv, SKIPPED, reason=_explain_class(conv, "a convolution"))
    if reason := _find_obstacle(conv):
        return Row(name, conv, SKIPPED, reason=reason)
    shape = (conv.in_channels, conv.out_channels, conv.kernel_size)
    geometry = {**find_geometry(conv), "bias": conv.bias is not None}
    like = {"device": "meta", "dtype": conv.weight.dtype}
    make: Any = DECONVOLUTIONS[plain]
    return _replace(name, conv, make(*shape, **geometry, **options, **like))


def _plan_linear(row: Row, options: Mapping[str, Any]) -> Row:
    linear = row.module
    if not _is_plain_linear(linear):
        return replace(row, action=SKIPPED, reason=_explain_class(linear, "an nn.Linear"))
    if reason := _find_obstacle(linear):
        return replace(row, action=SKIPPED, reason=reason)
    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    like = {"device": "meta", "dtype": linear.weight.dtype}
    make: Any = Delinear
    return _replace(row.name, linear, make(*shape, **options, **like))


def _is_plain_linear(module: nn.Module) -> bool:
    """Return True for the linear layer of torch, or of timm, whose forward is the same."""
    kind = type(module)
    return kind is nn.Linear or (kind.__module__, kind.__name__) == ("timm.layers.linear", "Linear")


def _find_obstacle(module: _ConvNd | nn.Linear) -> str:
    """Return the reason why a layer of a supported class cannot be replaced, or ""."""
    if "weight" in vars(module) or "bias" in vars(module):  # set by a hook
        return "a hook computes its weight or bias: convert the model before adding the hook"
    if _COMPUTING_NAMES & vars(module).keys():
        return "its forward was replaced: convert the model before replacing the forward"
    if not module.weight.is_floating_point():
        return (
            f"whitening needs real numbers, not {module.weight.dtype}: use separate channels for "
            "real and imaginary parts"
        )
    return ""


def _replace(name: str, module: nn.Module, layer: Whitening) -> Row:
    becomes = f"{type(layer).__name__}, blocks of {layer.blocks.size}"
    return Row(name, module, REPLACED, becomes, layer=layer)


def _name_class(module: nn.Module) -> str:
    """Return the name of the class, with its module unless the class is of torch."""
    kind = type(module)
    if kind.__module__.startswith("torch.nn."):
        return kind.__name__
    return f"{kind.__module__}.{kind.__name__}"


class _BatchNormPlanner:
    """Plan the BatchNorms of a model, given the rows of its other layers.

    Args:
        layers: the layers of the plan, by name.
        rows: their rows, by id of the layer; `plan` adds to them.
        flow: the dataflow of the model.
        tied: ids of the parameters that several modules share.
        pretrained: keep the outputs of each BatchNorm in evaluation.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        rows: dict[int, Row],
        flow: Dataflow,
        tied: set[int],
        pretrained: bool,
    ) -> None:
        self.layers, self.rows, self.flow = layers, rows, flow
        self.tied, self.pretrained = tied, pretrained
        self.whitens = any(row.whitens for row in rows.values())
        # SyncBatchNorm has one class for all dimensions: take the dimensions of the convolutions.
        seen = {len(conv.kernel_size) for conv in layers.values() if isinstance(conv, _ConvNd)}
        self.sync_dims = seen.pop() if len(seen) == 1 else 2

    def plan(self, name: str, norm: nn.Module) -> None:
        """Add the row of a BatchNorm, and pair it with the convolution that it is folded into."""
        row = self._plan(name, norm)
        if self.pretrained and row.action == REPLACED and self._is_tied(norm):
            row = replace(row, reason=f"{row.reason}; its weight is no longer tied")
        dims = count_dims(norm, self.sync_dims) if self._sees_maps(norm) else 0
        self.rows[id(norm)] = replace(row, dims=dims)
        if row.partner is not None:
            self.rows[id(row.partner)] = replace(self.rows[id(row.partner)], partner=norm)

    def _plan(self, name: str, norm: nn.Module) -> Row:
        if reason := self._find_dependency(name, norm):
            return Row(name, norm, KEPT, reason=reason)
        if not is_known_batchnorm(norm):
            reason = f"forward of {_name_class(norm)} is not known: use a BatchNorm of torch"
            return Row(name, norm, SKIPPED, reason=reason)
        source = self.flow.find_exclusive_source(norm)
        before = None if source is None or is_batchnorm(source) else self.rows.get(id(source))
        if before is not None and before.action != REPLACED:
            return Row(name, norm, KEPT, reason=f"follows {before.name}, which is {before.action}")
        if self.pretrained and find_affine(norm) is None:
            reason = "has no running statistics to fold: replaced with pretrained=False"
            return Row(name, norm, SKIPPED, reason=reason)
        rest = [type(module).__name__ for module in extra_modules(norm)]
        becomes = ", ".join(rest) or "Identity"
        if before is None:
            redundant, reason = self._find_whitener(norm)
            obstacle = "cannot be folded into a convolution before it"
        elif obstacle := self._find_other_use(norm, before):
            redundant, reason = True, f"follows {before.name}"
        else:
            reason = f"{'folded into' if self.pretrained else 'follows'} {before.name}"
            return Row(name, norm, REPLACED, becomes, reason, partner=before.module)
        if not redundant:
            return Row(name, norm, KEPT, reason=reason)
        if self.pretrained:
            return Row(name, norm, REPLACED, ", ".join(["ChannelAffine", *rest]), obstacle)
        if function := None if rest else self.flow.find_inplace_function(norm):
            reason = f"{function} would overwrite its input in place: call it out of place"
            return Row(name, norm, SKIPPED, reason=reason)
        return Row(name, norm, REPLACED, becomes, reason)

    def _is_tied(self, module: nn.Module) -> bool:
        """Return True if a module shares a parameter with another module."""
        return any(id(parameter) in self.tied for parameter in module.parameters())

    def _find_dependency(self, name: str, norm: nn.Module) -> str:
        """Return the reason why code of the model may depend on a BatchNorm, or ""."""
        owner = name.rpartition(".")[0]
        if owner in self.layers and self.layers[owner] is not norm:
            whole = f"{owner or 'the model'}, {_name_class(self.layers[owner])}"
            return f"is a part of {whole}: make convolution and norm separate layers"
        if (reader := self.flow.find_reader(norm)) is not None:
            return f"{_name_class(reader)} reads its tensors by name: call the layer instead"
        if (caller := self.flow.find_untraced_caller(norm)) is not None:
            return (
                f"{_explain_untraced(caller)}: if a replaced convolution precedes the norm, "
                "replace the norm by nn.Identity"
            )
        if (caller := self.flow.find_class_dependent_caller(norm)) is not None:
            return _explain_classes(caller)
        return ""

    def _find_other_use(self, norm: nn.Module, before: Row) -> str:
        """Return the reason why code besides the BatchNorm may use a convolution, or ""."""
        if self._is_tied(before.module):
            return f"{before.name} shares its weight, which stays tied"
        if (ancestor := self.flow.find_untraced_ancestor(norm, before.module)) is not None:
            return f"{_explain_untraced(ancestor)}, so {before.name} may have other uses"
        if (caller := self.flow.find_branching_caller(norm, before.module)) is not None:
            return f"forward of {_name_class(caller)} may use {before.name} without the norm"
        return ""

    def _find_whitener(self, norm: nn.Module) -> tuple[bool, str]:
        """Return True if a deconvolution makes a BatchNorm redundant, and the reason."""
        if not self.whitens:
            return False, "no layer of the model whitens: see the rows of the convolutions"
        consumers, is_complete = self.flow.find_consumers(norm, (_ConvNd, nn.Linear))
        after = [self.rows.get(id(layer)) for layer in consumers]
        if is_complete and all(row is not None and row.layer is not None for row in after):
            return True, "the layers after it whiten"
        for row in after:
            if row is not None and isinstance(row.module, _ConvNd) and not row.whitens:
                return False, f"precedes {row.name}, which is {row.action}"
        if self._sees_maps(norm):
            return True, "whitening replaces normalisation of maps"
        return False, "may normalise vectors: linear=[NAME] whitens a linear layer after it"

    def _sees_maps(self, norm: nn.Module) -> bool:
        """Return True if the input has spatial dimensions, not only features."""
        origin = self.flow.find_origin(norm)
        if isinstance(norm, nn.BatchNorm1d):
            return isinstance(origin, _ConvNd)
        return not (
            isinstance(norm, nn.SyncBatchNorm) and isinstance(origin, nn.Linear | nn.Flatten)
        )


def _explain_untraced(module: nn.Module) -> str:
    return f"forward of {_name_class(module)} cannot be traced"


def _explain_classes(module: nn.Module) -> str:
    return (
        f"forward of {_name_class(module)} depends on the classes of its layers: "
        "select the layers by name"
    )


def _explain_class(module: nn.Module, supported: str) -> str:
    return f"there is no deconvolution for {_name_class(module)}: use {supported} of torch instead"


def _explain_norm(norm: nn.Module) -> str:
    if isinstance(norm, nn.LayerNorm):
        return "normalises each sample separately, which whitening does not replace"
    return "only BatchNorm is replaced: build the model with BatchNorm first"


def _explain_linear(
    name: str, linear: bool | Iterable[str], ends: bool | None, whitens: bool
) -> str:
    """Return the reason why a linear layer that no pattern names is kept, or ""."""
    remedy = f"linear={[name]} replaces it"
    if linear is not True:
        return remedy
    if ends is None:
        return f"its path to the output cannot be traced: {remedy}"
    if not ends:
        return f"does not end the model: {remedy}"
    return "" if whitens else f"no convolution is replaced: {remedy} alone"


def _add_biases(rows: dict[int, Row]) -> None:
    """Give a bias to new convolutions without one, in place of the shift of BatchNorm."""
    for key, row in rows.items():
        layer = row.layer
        if isinstance(layer, Convolution) and layer.bias is None:
            weight: Any = layer.weight
            layer.bias = nn.Parameter(weight.new_empty(layer.out_channels))
            rows[key] = replace(row, becomes=f"{row.becomes}, with a bias")
