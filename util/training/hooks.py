"""Hooks that adapt training, testing and diagnostics to a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

BatchContext = Callable[[int, int], AbstractContextManager[None]]


@dataclass(frozen=True)
class ModelHooks:
    """Functions that the harness calls around a model; the defaults suit any model.

    Attributes:
        batch_context: (index of this rank's first image in the batch, images of all ranks) -> the
            context of a training forward, also inside a CUDA graph. None: no context.
        eval_model: a model in evaluation mode -> an equivalent model to test in its place.
        phase: model -> key that identifies the control flow of its next training forward.
        advance: model -> None; counts a training forward that a CUDA graph has replayed.
        hold: () -> context in which forwards keep the phase and are not counted.
        diagnose: (model, images) -> scalars about its layers by tag, for TensorBoard.
        take_weights: (model, tensors by name, builder of the model with BatchNorm or None) -> the
            attributes of `models.transfer.Transfer`. None: the model takes no weights of --init.
        calibrate: (model, batches, number of batches, forward=) -> number of batches used; see
            `deconv.calibrate`. None: the model needs none.
    """

    batch_context: BatchContext | None = None
    eval_model: Callable[[nn.Module], nn.Module] = lambda model: model
    phase: Callable[[nn.Module], Hashable] = lambda model: None
    advance: Callable[[nn.Module], None] = lambda model: None
    hold: Callable[[], AbstractContextManager[None]] = nullcontext
    diagnose: Callable[[nn.Module, Tensor], Mapping[str, float]] = lambda model, images: {}
    take_weights: Callable[..., Any] | None = None
    calibrate: Callable[..., int] | None = None


def enter_batch(
    batch_context: BatchContext | None, offset: int, total: int
) -> AbstractContextManager[None]:
    """Return the context of a training forward; see `World.batch_offset` for the numbers."""
    return nullcontext() if batch_context is None else batch_context(offset, total)
