"""Find where a training step became NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from util.training.accelerator import Accelerator


def find_nonfinite(model: nn.Module, accelerator: Accelerator, images: Tensor) -> str | None:
    """Return the first layer output, else the first gradient, that is not finite.

    Args:
        model: after the step's backward.
        accelerator: precision and device of the step.
        images: (N, C, H, W) images of the step, on the device of `model`.

    Returns:
        `the output of features.4 (BatchNorm2d)`, `the gradient of classifier.weight`, or None.
    """
    layer, gradient = find_nonfinite_layer(model, accelerator, images), _find_gradient(model)
    if layer:
        return f"the output of {layer}"
    return f"the gradient of {gradient}" if gradient else None


@torch.no_grad()
def find_nonfinite_layer(model: nn.Module, accelerator: Accelerator, images: Tensor) -> str | None:
    """Return the first layer whose output is not finite when training on `images`.

    The forward updates running statistics again. Layers that communicate need all ranks to call.
    """
    layers: list[str] = []
    with _recording_nonfinite(model, layers), accelerator.autocast():
        model.train()(images)
    return layers[0] if layers else None


def _find_gradient(model: nn.Module) -> str | None:
    """Return the last parameter with a non-finite gradient, the first that backward reaches."""
    named = reversed(list(model.named_parameters()))
    return next((name for name, p in named if p.grad is not None and not _is_finite(p.grad)), None)


@contextmanager
def _recording_nonfinite(model: nn.Module, layers: list[str]) -> Iterator[None]:
    """Add each leaf layer that outputs a non-finite value to `layers` within the block."""
    leaves = [(name, layer) for name, layer in model.named_modules() if not [*layer.children()]]

    def watch(name: str, layer: nn.Module) -> RemovableHandle:
        def check(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if not _is_finite(output):
                layers.append(f"{name} ({type(layer).__name__})")

        return layer.register_forward_hook(check)

    handles = [watch(name, layer) for name, layer in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())
