"""Alternate between batch statistics and running statistics in training (`freeze`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable would import the compiler here

_phase_held = False  # set by `hold_phase`


class Freezing(nn.Module):
    """Base class whose training forwards alternate between batch and running statistics.

    The buffer `freeze_steps` counts the training forwards. A Python integer mirrors the buffer, so
    that no forward waits for the device. Only `_count_step` advances the two. Loading a state_dict
    copies the buffer to the integer.

    Attributes:
        freeze: True if the layer alternates.
        freeze_iter: number of forwards with batch statistics in a cycle of 10 * freeze_iter.
        frozen: True if the latest training forward used the running statistics. Compiled code
            guards on this attribute, not on the count, so it is compiled once per phase.
    """

    freeze = False
    freeze_iter: int
    frozen: bool
    freeze_steps: Tensor
    track_running_stats: bool
    _steps: int

    def init_freeze(self, freeze: bool, freeze_iter: int = 100) -> None:
        """Check the options and, with `freeze`, register the counter; see `FastDeconv`.

        Raises:
            ValueError: `freeze_iter` is out of range, or there are no running statistics.
        """
        if freeze_iter < 1 or freeze_iter % 1:
            raise ValueError(f"freeze_iter must be a whole number of steps, got {freeze_iter}")
        if freeze and not self.track_running_stats:
            raise ValueError("freeze=True needs track_running_stats=True, got False")
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
            self._count_valid(x)

    def check_input(self, x: Tensor) -> Tensor:
        """Return the prepared input on the meta device; raise ValueError if x is invalid."""
        raise NotImplementedError

    @_disable_dynamo
    def _count_valid(self, x: Tensor) -> None:
        """Count a forward if its input is valid."""
        self.check_input(x)
        self._count_step()

    @_disable_dynamo
    def _count_step(self) -> None:
        """Count a forward and set its phase; skip a recomputation by activation checkpointing."""
        if in_backward():
            return
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "freeze=True does not work in DataParallel, whose replicas lose the step count: "
                "use DistributedDataParallel"
            )
        self.frozen = self.freezes_next
        if not _phase_held:
            self.freeze_steps += 1
            self._steps += 1

    def read_freeze_steps(self) -> None:
        """Copy the buffer `freeze_steps` to its Python mirror, after a load for example."""
        if self.freeze and not self.freeze_steps.is_meta:
            self._steps = int(self.freeze_steps)


def in_backward() -> bool:
    """Return True if activation checkpointing recomputes this forward in a backward pass.

    Statistics must not count such a batch twice. Compiled code cannot detect recomputation: compile
    the function that checkpoints, not the checkpointed one.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def find_phase(model: nn.Module) -> tuple[bool, ...]:
    """Return one flag per layer with `freeze`: True if its next training forward is frozen."""
    return tuple(layer.freezes_next for layer in _freezing_layers(model))


def advance_phase(model: nn.Module) -> None:
    """Count one training forward of each layer with `freeze`, after a CUDA graph's replay."""
    for layer in _freezing_layers(model):
        layer._count_step()


@contextmanager
def hold_phase() -> Iterator[None]:
    """Keep every layer in the phase of its next forward; count no forward in this context."""
    global _phase_held
    previous, _phase_held = _phase_held, True
    try:
        yield
    finally:
        _phase_held = previous


def _freezing_layers(model: nn.Module) -> Iterator[Freezing]:
    return (m for m in model.modules() if isinstance(m, Freezing) and m.freeze)
