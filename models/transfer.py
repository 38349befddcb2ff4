"""Transfer weights from one network to another, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .factory import fold_batchnorm

STATISTICS = ("running_", "num_batches_tracked")  # prefixes of buffers that training estimates
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Transfer:
    """Result of a transfer.

    Attributes:
        taken: number of tensors that the network took.
        total: number of tensors of the network.
        new: names of the layers that keep their initial weights. Layers of other shapes are among
            them, with both shapes.
        unused: names of the layers that the network does not have.
        needs_calibration: True if a whitening layer took weights for inputs without whitening.
    """

    taken: int
    total: int
    new: tuple[str, ...]
    unused: tuple[str, ...]
    needs_calibration: bool


def take_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    build_batchnorm: Callable[[], nn.Module] | None = None,
) -> Transfer:
    """Copy the weights of each layer that `model` has under the same name and shape.

    A layer takes all of its tensors or none.

    Args:
        model: changed in place.
        state: tensors by name, of any network.
        build_batchnorm: builds `model` with BatchNorm, if `model` has deconvolutions. A `state`
            with BatchNorm is loaded there, and each BatchNorm is folded into its convolution.

    Raises:
        ValueError: a layer's running statistics do not fit, so that its weights would be wrong; a
            BatchNorm cannot be folded or is missing in `model`; or no layer fits.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
        >>> state = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 5)).state_dict()
        >>> take_weights(model, state).new
        ('1 (weight 5 x 8 there, 3 x 8 here)',)
    """
    has_batchnorm = any(name.endswith("running_var") for name in state)
    if build_batchnorm is None or not has_batchnorm:
        if has_batchnorm and not any(name.endswith("running_var") for name in model.state_dict()):
            raise ValueError(
                "the weights have BatchNorm, but the network none; build it with BatchNorm or "
                "deconvolution"
            )
        return _take_layers(model, state)
    twin = build_batchnorm()
    transfer = _take_layers(twin, state)
    folded = _take_layers(model, fold_batchnorm(twin).state_dict())
    if lost := folded.new + folded.unused:
        raise ValueError(f"{lost[0]}: the BatchNorm cannot be folded into a convolution")
    return replace(transfer, needs_calibration=folded.needs_calibration)


@torch.no_grad()
def _take_layers(model: nn.Module, state: Mapping[str, Tensor]) -> Transfer:
    own, given = _group_by_layer(model.state_dict()), _group_by_layer(state)
    new, taken, needs_calibration = [], 0, False
    for layer, tensors in own.items():
        source = given.get(layer)
        if source is None:
            new.append(layer)
            continue
        if reason := _find_misfit(_drop_statistics(tensors), _drop_statistics(source)):
            new.append(f"{layer} ({reason})")
            continue
        lacks_whitening = not _keep_whitening(source) and bool(_keep_whitening(tensors))
        expected = _drop_statistics(tensors) if lacks_whitening else tensors
        if reason := _find_misfit(expected, source):
            raise ValueError(f"the running statistics of layer {layer} do not fit: {reason}")
        for name in expected:
            tensors[name].copy_(source[name])
        taken += len(expected)
        needs_calibration |= lacks_whitening
    if not taken:
        raise ValueError("no layer fits in name and shape")
    unused = tuple(layer for layer in given if layer not in own)
    return Transfer(taken, sum(map(len, own.values())), tuple(new), unused, needs_calibration)


def _group_by_layer(state: Mapping[str, Tensor]) -> dict[str, Tensors]:
    """Return the tensors of each layer, without the step of a --freeze cycle."""
    layers: dict[str, Tensors] = {}
    for path, value in state.items():
        layer, _, name = path.rpartition(".")
        if isinstance(value, Tensor) and name != "freeze_steps":
            layers.setdefault(layer, {})[name] = value
    return layers


def _drop_statistics(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.startswith(STATISTICS)}


def _keep_whitening(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if name.startswith("running_cov")}


def _find_misfit(own: Tensors, given: Tensors) -> str:
    """Return the first difference in names or shapes; "" if there is none."""
    for name in sorted({*own, *given}, reverse=True):  # weight before bias
        there, here = (_describe_shape(tensors.get(name)) for tensors in (given, own))
        if there != here:
            return f"{name} {there} there, {here} here"
    return ""


def _describe_shape(value: Tensor | None) -> str:
    return "absent" if value is None else " x ".join(map(str, value.shape)) or "one number"
