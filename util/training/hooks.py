"""Hooks that adapt training, testing and diagnostics to a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

BatchContext = Callable[[int, int], AbstractContextManager[None]]


def no_batch_context(first: int, total: int) -> AbstractContextManager[None]:
    """Return a context that does nothing, for layers that ignore the other ranks."""
    return nullcontext()


@dataclass(frozen=True)
class ModelHooks:
    """Functions that the harness calls around a model; the defaults suit any model.

    Attributes:
        batch_context: (index of this rank's first image in the batch, images of all ranks) -> the
            context of a training step's forward.
        eval_model: a model in evaluation mode -> an equivalent model to test in its place.
        diagnose: (model, images) -> scalars about its layers by name, for TensorBoard.
    """

    batch_context: BatchContext = no_batch_context
    eval_model: Callable[[nn.Module], nn.Module] = lambda model: model
    diagnose: Callable[[nn.Module, Tensor], Mapping[str, float]] = lambda model, images: {}
