"""Capture a training step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from util.errors import RunError


class GraphedModel(nn.Module):
    """Model that trains on full batches by CUDA graphs and runs as usual otherwise.

    Without graphs, each launch of whitening's many small kernels takes longer than the kernel.

    Args:
        model: on its GPU. The capture leaves buffers and random state unchanged.
        images: a full batch of any content; later batches are copied into its memory.

    Raises:
        RunError: the model cannot be captured, for example because it waits for the GPU.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.shape = images.shape
        try:
            with _keep_state(model, images.device):
                step = _Step(model).train()
                self.step = torch.cuda.make_graphed_callables(step, (images,))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = f"steps cannot be captured ({str(error).splitlines()[0]})"
            raise RunError(f"{reason}: train with --cuda-graphs False") from error

    def forward(self, images: Tensor) -> Tensor:
        is_full = self.training and torch.is_grad_enabled() and images.shape == self.shape
        return (self.step if is_full else self.step.model)(images)


class _Step(nn.Module):
    """Wrapper whose forward is captured, so that `model` keeps its own for other batches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


@contextmanager
def _keep_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore buffers of `model` and random state after the block."""
    before = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
