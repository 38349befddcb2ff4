"""Find where a training step became NaN or infinite."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from util.training.accelerator import Accelerator


def find_nonfinite(
    model: nn.Module, accelerator: Accelerator, images: Tensor, parameters: Sequence[Tensor] = ()
) -> str | None:
    """Return the first layer output, else the first gradient, that is not finite.

    The result is `the output of features.4 (BatchNorm2d)` or `the gradient of classifier.weight`.
    The forward updates running statistics again. Layers that communicate need all ranks to call.

    Args:
        model: before the step's update.
        accelerator: precision of the step.
        images: (N, C, H, W) images of the step, on the device of `model`.
        parameters: parameters whose gradient is not finite.
    """
    layers: list[str] = []

    def check(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.isfinite().all():
            layers.append(f"the output of {name} ({type(layer).__name__})")

    leaves = ((name, layer) for name, layer in model.named_modules() if not [*layer.children()])
    hooks = [layer.register_forward_hook(partial(check, name)) for name, layer in leaves]
    with torch.no_grad(), accelerator.autocast():
        model.train()(images)
    for hook in hooks:
        hook.remove()
    known = {id(parameter) for parameter in parameters}
    bad = [name for name, parameter in model.named_parameters() if id(parameter) in known]
    # Backward reaches the last parameter first.
    return next(iter([*layers, *(f"the gradient of {name}" for name in reversed(bad))]), None)
