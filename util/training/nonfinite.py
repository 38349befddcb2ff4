"""Where numbers went bad: asked once, when a run ends for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from util.training.accelerator import Accelerator


def name_bad_place(model: nn.Module, accelerator: Accelerator, images: Tensor) -> str | None:
    """Where a step went bad: in the output of a layer, or in the gradient of a parameter."""
    layer, gradient = name_bad_layer(model, accelerator, images), name_bad_gradient(model)
    if layer:
        return f"the output of {layer}"
    return f"the gradient of {gradient}" if gradient else None


@torch.no_grad()
def name_bad_layer(model: nn.Module, accelerator: Accelerator, images: Tensor) -> str | None:
    """The first layer whose output is not finite when the images are seen again in training.

    Running statistics take the images in again. Where layers talk to other processes, all must
    ask.

    Args:
        images: (N, C, H, W), on the device of the model.

    Returns:
        `features.4 (BatchNorm2d)`, or None if every output is finite.
    """
    found: list[str] = []
    with _watched(model, found), accelerator.autocast():
        model.train()(images)
    return found[0] if found else None


def name_bad_gradient(model: nn.Module) -> str | None:
    """The parameter whose gradient became not finite first: backward goes from last to first."""
    named = reversed(list(model.named_parameters()))
    return next((name for name, p in named if p.grad is not None and not _is_finite(p.grad)), None)


@contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Within the block, layers that give out what is not finite are added to `found`."""
    leaves = [(name, layer) for name, layer in model.named_modules() if not [*layer.children()]]

    def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def look(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if not _is_finite(output):
                found.append(f"{name} ({type(layer).__name__})")

        return layer.register_forward_hook(look)

    handles = [watch(name, layer) for name, layer in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())
