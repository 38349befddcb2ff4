"""Training steps whose kernels a GPU is told all at once, in place of one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from util.errors import RunError


class Replayed(nn.Module):
    """A network that trains on full batches by CUDA graphs, and is itself in all else.

    To launch a kernel takes a process longer than many kernels take, and whitening has many small
    ones: a step of VGG-11 on 128 images of 32 x 32 waits for the process four fifths of its time.
    Forward and backward are therefore recorded once each, and replayed as a whole. The kernels are
    those of before, so nothing is computed otherwise.

    Args:
        model: on its GPU. Recording leaves no trace in its buffers.
        images: a full batch, whatever it shows; later ones are copied into its place.

    Raises:
        RunError: the network does what cannot be recorded, such as waiting for the GPU.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.shape = images.shape
        try:
            with _unchanged(model, images.device):
                step = _Step(model).train()
                self.step = torch.cuda.make_graphed_callables(step, (images,))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RunError(
                f"steps cannot be recorded ({reason}): train with --cuda-graphs False"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        full = self.training and torch.is_grad_enabled() and images.shape == self.shape
        return (self.step if full else self.step.model)(images)


class _Step(nn.Module):
    """What is recorded: the network within keeps its own forward, for batches that are not full."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it the model may be run: its buffers and the random numbers are then as before."""
    before = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
