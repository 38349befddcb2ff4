"""Rewrite weights so that training begins at the function of a model in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.precision import full_precision
from ..whitening import Whitening
from .fuse import fuse
from .recalibrate import find_input, recalibrate


@torch.inference_mode(False)  # the model can be trained later
@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    limit: int = 10,
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> int:
    """Let training begin where a model stands in evaluation, by rewriting its deconvolutions.

    Evaluation applies W and b to raw patches. The layer takes mu and D of some batches as running
    statistics, and the weight and bias that undo them:

        W <- W D^-1,    b <- b + W mu,    so that W D^-1 D (x - mu) + b + W mu = W x + b

    Outputs in evaluation stay the same. In training mu and D of the batch stand in for those of
    all batches, and outputs are nearly the same.

    One pass over the batches serves all layers. Its layers work as in evaluation, where their
    inputs depend on no layer's whitening. mu and Cov are plain means over all finite batches, or
    over all calls if a forward calls a layer several times. A layer that no finite batch reaches
    stays as it is. A layer without a bias gets one, which follows its weight. An error leaves the
    model as it was.

    Args:
        model: a model of `convert(..., pretrained=True)`, or any with deconvolutions; it changes.
        batches: (N, ...) inputs as in training, of its batch size, or tuples that start with them,
            as loaders yield. They are moved to the device of the model.
        limit: maximum number of batches.
        forward: runs a model on a batch of any kind, which it also moves to the device.

    Returns:
        The number of batches used.

    Raises:
        ValueError: there is no deconvolution layer or no finite batch, `limit` is below 1, a layer
            has no running statistics or shares its weight or bias with another layer, a part of the
            model is wrapped or sharded, or a hook computes a layer's weight.
        TypeError: a batch is of another kind, and there is no `forward`.

    Example:
        >>> model = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), pretrained=True)
        >>> calibrate(model, torch.randn(4, 16, 3, 9, 9))
        4
    """
    _refuse_shared_parameters(model)
    flags = [(module, module.training) for module in model.modules()]
    try:
        plain = fuse(model.eval())
    finally:
        for module, training in flags:
            module.training = training
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, Whitening)]
    kept = [(layer, *layer._fold_running()) for _, layer in layers]
    for name, layer in layers:
        twin = plain.get_submodule(name)
        twin.register_forward_pre_hook(_make_observer(layer), with_kwargs=True)
    device = layers[0][1].weight.device if layers else None

    def run(_: nn.Module, batch: Any) -> None:
        if forward is not None:
            forward(plain, batch)
        else:
            plain(find_input(batch).to(device))

    count = recalibrate(model, batches, limit, forward=run)
    for layer, weight, bias in kept:
        _undo_whitening(layer, weight, bias)
    return count


def _make_observer(layer: Whitening) -> Callable[..., None]:
    """Return a hook that shows the layer the input of its plain twin."""

    def observe(_: nn.Module, args: Any, kwargs: Any) -> None:
        layer.forward(*args, **kwargs)  # in training mode, and without the hooks of the layer

    return observe


def _undo_whitening(layer: Whitening, weight: Tensor, bias: Tensor) -> None:
    """Rewrite the layer so that evaluation applies the given weight and bias to raw patches."""
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros_like(bias), layer.weight.requires_grad)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    with full_precision(weight.device):
        mean, whiten = layer.running_whitening()
        inverse = {axis: torch.linalg.inv(matrix) for axis, matrix in whiten.items()}
        unwhitened, _ = layer._fold(mean, inverse)
        _, shifted = layer._fold(-mean, {})
    layer.weight.copy_(unwhitened)
    layer.bias.copy_(shifted)


def _refuse_shared_parameters(model: nn.Module) -> None:
    """Raise ValueError if a deconvolution shares a parameter: it cannot undo two whitenings."""
    owners: dict[int, str] = {}
    whitened = set[int]()
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            other = owners.setdefault(id(parameter), name)
            if isinstance(module, Whitening):
                whitened.add(id(parameter))
            if other != name and id(parameter) in whitened:
                raise ValueError(
                    f"{name} shares its {key} with {other}, so no {key} can undo the whitening of "
                    f"both: convert with skip={[other, name]}"
                )
