"""Hooks that adapt training, testing and diagnostics to a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

BatchContext = Callable[[int, int], AbstractContextManager[None]]


@dataclass(frozen=True)
class ModelHooks:
    """Functions that the harness calls around a model; the defaults suit any model.

    Attributes:
        batch_context: (index of this rank's first image in the batch, images of all ranks) -> the
            context of a training step's forward. None: no context.
        eval_model: a model in evaluation mode -> an equivalent model to test in its place.
        diagnose: (model, images) -> scalars about its layers by name, for TensorBoard.
    """

    batch_context: BatchContext | None = None
    eval_model: Callable[[nn.Module], nn.Module] = lambda model: model
    diagnose: Callable[[nn.Module, Tensor], Mapping[str, float]] = lambda model, images: {}
