"""Capture a training step as a CUDA graph."""

from __future__ import annotations

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
        # The capture replaces `forward` of the wrapper; `model` keeps its own for other batches.
        step = nn.Sequential(model).train()
        buffers = [buffer.clone() for buffer in model.buffers()]
        try:
            with torch.random.fork_rng([images.device] if images.is_cuda else []):
                self.step = torch.cuda.make_graphed_callables(step, (images,))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = f"steps cannot be captured ({str(error).splitlines()[0]})"
            raise RunError(f"{reason}: train with --cuda-graphs False") from error
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(value)

    def forward(self, images: Tensor) -> Tensor:
        is_full = self.training and torch.is_grad_enabled() and images.shape == self.shape
        return (self.step if is_full else self.step[0])(images)
