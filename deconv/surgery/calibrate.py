"""Rewrite weights so that training starts at the outputs of a model in evaluation."""

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
    """Rewrite the deconvolutions of a model so that training starts at its evaluation outputs.

    In evaluation, a layer applies a folded weight W and bias b to raw patches x. Calibration
    estimates mu and D from some batches and stores them as running statistics. The new weight and
    bias undo the whitening:

        W <- W D^-1,    b <- b + W mu,    so that W D^-1 D (x - mu) + b + W mu = W x + b

    Outputs in evaluation stay the same. In training, the layer uses mu and D of the current batch,
    which are close to the stored ones. Outputs are therefore nearly the same.

    One pass over the batches calibrates all layers. The model runs in evaluation, so inputs of a
    layer do not depend on the whitening of other layers. mu and Cov are plain means
    over all finite batches. If a forward calls a layer several times, each call counts as a batch.

    A layer without a finite batch does not change. A layer without a bias gets one, with the
    `requires_grad` of its weight. After an error the model is unchanged.

    Args:
        model: output of `convert(..., pretrained=True)`, or any model with deconvolutions. It is
            changed in place.
        batches: batches with the size and augmentation of training: inputs (N, ...), or tuples that
            start with inputs. They are moved to the device of the model.
        limit: maximum number of batches (default 10).
        forward: function of (model, batch) that moves a batch to the device and runs the model
            (default: call the model with the first tensor of the batch).

    Returns:
        The number of batches used.

    Raises:
        ValueError: there is no deconvolution layer or no finite batch; `limit` is below 1; a layer
            has no running statistics, pads with its mean (FastDeconv2019), or shares its weight or
            bias with another layer; a part of the model is wrapped or sharded; or a hook computes
            the weight of a layer.
        TypeError: a batch contains no tensor where expected, and `forward` is None.

    Example:
        >>> model = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), pretrained=True)
        >>> calibrate(model, torch.randn(4, 16, 3, 9, 9))
        4
    """
    _refuse_shared_parameters(model)
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()  # a `train` of the user's may return nothing
        plain = fuse(model)
    finally:
        for module, training in flags:
            module.training = training
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, Whitening)]
    for name, layer in layers:
        if layer.pads_with_mean:
            raise ValueError(
                f"{name or 'the layer'} ({type(layer).__name__}) pads with its mean, so no bias "
                "keeps its outputs: train it without calibrate"
            )
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
    """Return a hook of a fused layer that passes its input to the original layer."""

    def observe(_: nn.Module, args: Any, kwargs: Any) -> None:
        layer.forward(*args, **kwargs)  # in training mode, and without the hooks of the layer

    return observe


def _undo_whitening(layer: Whitening, weight: Tensor, bias: Tensor) -> None:
    """Rewrite the layer so that evaluation applies `weight` and `bias` to raw patches."""
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
    """Raise ValueError if a deconvolution shares a parameter with another layer."""
    owners: dict[int, str] = {}
    whitened = set[int]()
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            other = owners.setdefault(id(parameter), name)
            if isinstance(module, Whitening):
                whitened.add(id(parameter))
            if other != name and id(parameter) in whitened:
                raise ValueError(
                    f"{name} shares its {key} with {other}, and one {key} cannot undo two "
                    f"whitenings: convert with skip={[other, name]}"
                )
