"""What becomes of each layer of a network under deconvolution, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from inspect import signature

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..conv import Convolution, FastDeconv, FastDeconv1d, FastDeconv3d, find_geometry
from ..conv_transpose import FastDeconvTranspose1d, FastDeconvTranspose2d, FastDeconvTranspose3d
from ..linear import Delinear
from ..table import align
from ..whitening import Whitening
from .batchnorm import count_dims, extra_modules, find_affine, is_batchnorm, is_understood
from .fuse import refuse_wrapped
from .tracing import Dataflow

# What stands for each convolution of torch.
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


REPLACED, KEPT, SKIPPED = "replaced", "kept", "skipped"
_OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, _NormBase)


@dataclass(frozen=True)
class Row:
    """What becomes of one layer.

    Args:
        name: its first name in the network, "" for the network itself.
        module: the layer.
        action: "replaced", "kept" (nothing was to be done) or "skipped" (something stands against
            it).
        becomes: what replaces it, in words.
        reason: why, in words.
        layer: of a convolution or linear layer, what replaces it, on the meta device.
        partner: of a convolution the BatchNorm that alone gets its output, and the reverse, where
            both are replaced.
        dims: of a BatchNorm, dimensions of the images that it sees.
    """

    name: str
    module: nn.Module = field(repr=False)
    action: str
    becomes: str = ""
    reason: str = ""
    layer: nn.Module | None = field(default=None, repr=False)
    partner: nn.Module | None = field(default=None, repr=False)
    dims: int = field(default=2, repr=False)


class Plan(tuple[Row, ...]):
    """The rows, which print as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        lines = [("layer", "class", "", "becomes", "why")]
        for row in self:
            kind = type(row.module).__name__
            lines.append((row.name or "(all)", kind, row.action, row.becomes, row.reason))
        counts = [
            f"{sum(row.action == action for row in self)} {action}"
            for action in (REPLACED, KEPT, SKIPPED)
        ]
        return f"{align(lines)}\n{', '.join(counts)}"


def plan(
    model: nn.Module,
    *,
    bias: bool = True,
    linear: bool = False,
    block_linear: int = 512,
    pretrained: bool = False,
    skip: Iterable[str] = (),
    **options: object,
) -> Plan:
    """What `convert` would do to each convolution, normalisation and linear layer of a network.

    Args: those of `convert`, all of them.

    Returns:
        A row for each such layer, in the network's order: a tuple that prints as a table.

    Raises:
        ValueError, TypeError: as `convert`, but having nothing to replace is no error here.
    """
    refuse_wrapped(model, "Convert")
    _refuse_unknown(options)
    layers = {name: module for name, module in model.named_modules() if _is_concerned(module)}
    skipped = _find_skipped(layers, skip)
    shared = signature(Delinear).parameters.keys() & options.keys() - {"block"}
    of_head = {"block": block_linear, **{name: options[name] for name in shared}}
    *_, last = None, *(module for module in layers.values() if type(module) is nn.Linear)
    rows: dict[int, Row] = {}
    for name, module in layers.items():
        if name in skipped:
            rows[id(module)] = Row(name, module, SKIPPED, reason=f"as {skipped[name]!r} asks")
        elif isinstance(module, torch.jit.ScriptModule):
            reason = "is TorchScript: convert the network before torch.jit.script"
            rows[id(module)] = Row(name, module, SKIPPED, reason=reason)
        elif isinstance(module, Whitening):
            rows[id(module)] = Row(name, module, KEPT, reason="is a deconvolution already")
        elif isinstance(module, _ConvNd):
            rows[id(module)] = _plan_convolution(name, module, options)
        elif isinstance(module, nn.Linear):
            take = linear and module is last
            rows[id(module)] = _plan_linear(name, module, of_head if take else None)
        elif not is_batchnorm(module):
            rows[id(module)] = Row(name, module, KEPT, reason="is no BatchNorm")
    _plan_batchnorms(layers, rows, Dataflow(model), pretrained)
    if bias and any(row.action == REPLACED and row.layer is None for row in rows.values()):
        _give_biases(rows)
    return Plan(rows[id(module)] for module in layers.values())


def _refuse_unknown(options: Mapping[str, object]) -> None:
    """Raise TypeError for what is no option of whitening that all convolutions take by keyword."""
    parameters = signature(Convolution).parameters.values()
    known = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    for name in sorted(options.keys() - (known - {"device", "dtype"})):
        raise TypeError(f"convert() got an unexpected keyword argument {name!r}")


def _is_concerned(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):  # has no class of torch's
        return next(module.parameters(recurse=False), None) is not None
    kinds = (_ConvNd, nn.Linear, *_OTHER_NORMS)
    return isinstance(module, kinds) or is_batchnorm(module)


def _find_skipped(layers: Iterable[str], patterns: Iterable[str]) -> dict[str, str]:
    """The layers that patterns name, and the pattern of each."""
    if isinstance(patterns, str):
        raise ValueError(f"skip must be a list of patterns, got {patterns!r}")
    skipped: dict[str, str] = {}
    for pattern in patterns:
        found = [name for name in layers if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"skip: no layer of the model is called {pattern!r}")
        skipped |= dict.fromkeys(found, pattern)
    return skipped


def _plan_convolution(name: str, conv: nn.Module, options: Mapping[str, object]) -> Row:
    if type(conv) not in DECONVOLUTIONS:
        return Row(name, conv, SKIPPED, reason=f"there is no deconvolution for {_name_kind(conv)}")
    if reason := _find_obstacle(conv):
        return Row(name, conv, SKIPPED, reason=reason)
    shape = (conv.in_channels, conv.out_channels, conv.kernel_size)
    where = {**find_geometry(conv), "bias": conv.bias is not None}
    on = {"device": "meta", "dtype": conv.weight.dtype}
    return _replace(name, conv, DECONVOLUTIONS[type(conv)](*shape, **where, **options, **on))


def _plan_linear(name: str, linear: nn.Module, options: Mapping[str, object] | None) -> Row:
    if options is None:
        return Row(name, linear, KEPT, reason="linear=True takes the last linear layer only")
    if reason := _find_obstacle(linear):
        return Row(name, linear, SKIPPED, reason=reason)
    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    on = {"device": "meta", "dtype": linear.weight.dtype}
    return _replace(name, linear, Delinear(*shape, **options, **on))


def _find_obstacle(module: nn.Module) -> str:
    """Why a layer of a class that can be replaced cannot, or nothing."""
    if "weight" in vars(module) or "bias" in vars(module):  # what a hook set
        return "a hook computes its weight or its bias"
    if not module.weight.is_floating_point():
        return f"only real numbers are whitened, not {module.weight.dtype}"
    return ""


def _replace(name: str, module: nn.Module, layer: Whitening) -> Row:
    becomes = f"{type(layer).__name__}, blocks of {layer.blocks.size}"
    return Row(name, module, REPLACED, becomes, layer=layer)


def _name_kind(module: nn.Module) -> str:
    """The class; with its home where that is not torch, as the name may be one of torch's."""
    kind = type(module)
    return (
        kind.__name__
        if kind.__module__.startswith("torch.nn.")
        else f"{kind.__module__}.{kind.__name__}"
    )


def _plan_batchnorms(
    layers: Mapping[str, nn.Module], rows: dict[int, Row], flow: Dataflow, pretrained: bool
) -> None:
    """Add the rows of the BatchNorms, and pair those of convolutions whose output they get."""
    whitens = any(row.layer or isinstance(row.module, Whitening) for row in rows.values())
    # One class of SyncBatchNorm is for images of all dimensions: those of the network's.
    seen = {len(conv.kernel_size) for conv in layers.values() if isinstance(conv, _ConvNd)}
    of_any = seen.pop() if len(seen) == 1 else 2
    for name, norm in layers.items():
        if id(norm) in rows:
            continue
        if reason := _find_tie(name, norm, layers, flow):
            rows[id(norm)] = Row(name, norm, KEPT, reason=reason)
            continue
        source = flow.find_source(norm)
        before = None if source is None or is_batchnorm(source) else rows.get(id(source))
        after = [rows.get(id(layer)) for layer in flow.find_targets(norm, (_ConvNd, nn.Linear))]
        if after and all(row and row.layer for row in after):
            goes, why = True, "what follows it whitens"
        elif whitens and _is_of_maps(norm, flow):
            goes, why = True, "every BatchNorm of maps does"
        elif whitens:
            goes, why = False, "may be of vectors, which nothing after it whitens"
        else:
            goes, why = False, "no layer of the network whitens"
        row = _plan_batchnorm(name, norm, before, flow, pretrained, goes, why)
        rows[id(norm)] = replace(row, dims=count_dims(norm, of_any))
        if row.partner is not None:
            rows[id(source)] = replace(before, partner=norm)


def _find_tie(name: str, norm: nn.Module, layers: Mapping[str, nn.Module], flow: Dataflow) -> str:
    """Why code of the network cannot do without a BatchNorm, or nothing."""
    owner = name.rpartition(".")[0]
    if owner in layers and layers[owner] is not norm:
        return f"is a part of {owner or 'the model'}, {_name_kind(layers[owner])}"
    reader = flow.find_reader(norm)
    return "" if reader is None else f"{_name_kind(reader)} uses more than its output"


def _is_of_maps(norm: nn.Module, flow: Dataflow) -> bool:
    """Whether a BatchNorm sees maps: two classes are for vectors as well, which nothing whitens."""
    maker = flow.find_maker(norm)
    if isinstance(norm, nn.BatchNorm1d):
        return isinstance(maker, _ConvNd)
    return not (isinstance(norm, nn.SyncBatchNorm) and isinstance(maker, nn.Linear | nn.Flatten))


def _give_biases(rows: dict[int, Row]) -> None:
    """To new convolutions that have none: BatchNorm's shift stood for it."""
    for key, row in rows.items():
        if isinstance(row.layer, Convolution) and row.layer.bias is None:
            row.layer.bias = nn.Parameter(row.layer.weight.new_empty(row.layer.out_channels))
            rows[key] = replace(row, becomes=f"{row.becomes}, with a bias")


def _plan_batchnorm(
    name: str,
    norm: nn.Module,
    before: Row | None,
    flow: Dataflow,
    pretrained: bool,
    goes: bool,
    why: str,
) -> Row:
    """What becomes of a BatchNorm.

    Args:
        before: what becomes of the layer whose output it gets; None where that is none of ours.
        goes, why: whether it does, and the reason, where `before` is None.
    """
    if not is_understood(norm):
        return Row(name, norm, SKIPPED, reason=f"what {_name_kind(norm)} does is not known")
    if before is not None and before.action != REPLACED:
        return Row(name, norm, KEPT, reason=f"follows {before.name}, which is {before.action}")
    if pretrained and find_affine(norm) is None:
        return Row(name, norm, SKIPPED, reason="has no running statistics to fold")
    rest = [type(part).__name__ for part in extra_modules(norm)]
    if before is not None:
        becomes = ", ".join(rest) or "Identity"
        reason = f"folded into {before.name}" if pretrained else f"follows {before.name}"
        return Row(name, norm, REPLACED, becomes, reason, partner=before.module)
    if not goes:
        return Row(name, norm, KEPT, reason=why)
    if pretrained:
        becomes = ", ".join(["ChannelAffine", *rest])
        return Row(name, norm, REPLACED, becomes, "no layer before it can take it in")
    if function := None if rest else flow.find_overwriter(norm):
        return Row(name, norm, SKIPPED, reason=f"{function} after it would overwrite its input")
    becomes = ", ".join(rest) or "Identity"
    return Row(name, norm, REPLACED, becomes, why)
