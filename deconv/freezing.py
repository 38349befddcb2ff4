"""Cycle of `freeze`: estimate statistics for some steps, then train on the running ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable would import the compiler here

_holds = False  # set by `hold_phase`


class Freezing(nn.Module):
    """A layer whose training forwards alternate between batch and running statistics.

    The buffer `freeze_steps` counts the training forwards. A Python integer mirrors it, so that no
    forward waits for the device. Both move in `_count_step` alone; loading reads the buffer again.

    Attributes:
        freeze: the cycle is on.
        freeze_iter: forwards that estimate, of 10 * freeze_iter in a cycle.
        frozen: the latest training forward used the running statistics. Compiled code guards this
            attribute, not the count: it is compiled once per phase.
    """

    freeze = False
    freeze_iter: int
    frozen: bool
    freeze_steps: Tensor
    track_running_stats: bool
    _steps: int

    def init_freeze(self, freeze: bool, freeze_iter: int = 100) -> None:
        """Check the options, and register the counter if `freeze` is on; see `FastDeconv`.

        Raises:
            ValueError: `freeze_iter` is out of range, or there are no running statistics.
        """
        if freeze_iter < 1 or freeze_iter % 1:
            raise ValueError(f"freeze_iter must be a whole number of steps, got {freeze_iter}")
        if freeze and not self.track_running_stats:
            raise ValueError("freeze=True needs track_running_stats=True: it trains on them")
        self.freeze, self.freeze_iter = freeze, int(freeze_iter)
        if freeze:
            self.frozen, self._steps = False, 0
            device = next(self.parameters()).device
            self.register_buffer("freeze_steps", torch.tensor(0, device=device))

    @property
    def freezes_next(self) -> bool:
        """Return True if the next training forward uses the running statistics."""
        return self._steps % (10 * self.freeze_iter) >= self.freeze_iter

    def begin_forward(self, x: Tensor) -> None:
        """Choose the phase of a training forward on x, and count the forward."""
        if self.freeze and self.training:
            self._count_accepted(x)

    def check_input(self, x: Tensor) -> Tensor:
        """Raise the error by which the layer refuses x, else return its images without numbers."""
        raise NotImplementedError

    @_disable_dynamo
    def _count_accepted(self, x: Tensor) -> None:
        """Count a forward, unless the layer refuses its input."""
        self.check_input(x)
        self._count_step()

    @_disable_dynamo
    def _count_step(self) -> None:
        """Count a forward, but not one that gradient checkpointing repeats: its phase remains."""
        if in_backward():
            return
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "freeze=True counts steps, which DataParallel loses: use DistributedDataParallel"
            )
        self.frozen = self.freezes_next
        if not _holds:
            self.freeze_steps += 1
            self._steps += 1

    def read_freeze_steps(self) -> None:
        """Set the mirror to the buffer, after somebody else has written the buffer."""
        if self.freeze and not self.freeze_steps.is_meta:
            self._steps = int(self.freeze_steps)


def in_backward() -> bool:
    """Return True if gradient checkpointing runs the forward again, inside a backward pass.

    Statistics must not count such a batch twice. Compiled code cannot ask: compile the function
    that checkpoints, not the checkpointed one.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def find_phase(model: nn.Module) -> tuple[bool, ...]:
    """Return for each layer with `freeze` if the next training forward uses running statistics."""
    return tuple(layer.freezes_next for layer in _freezing_layers(model))


def advance_phase(model: nn.Module) -> None:
    """Count a training forward of each layer with `freeze` that a CUDA graph has replayed."""
    for layer in _freezing_layers(model):
        layer._count_step()


@contextmanager
def hold_phase() -> Iterator[None]:
    """Keep all layers in the phase of their next forward: no forward inside is counted."""
    global _holds
    previous, _holds = _holds, True
    try:
        yield
    finally:
        _holds = previous


def _freezing_layers(model: nn.Module) -> Iterator[Freezing]:
    return (m for m in model.modules() if isinstance(m, Freezing) and m.freeze)
