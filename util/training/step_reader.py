"""Read the results of training steps one step late, so that no step waits for the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from util.errors import DataError, TrainingDiverged
from util.training.metrics import EpochMetrics, Metrics, average_rows


class HostCopy:
    """Copy of a tensor to host memory that starts at once; only `read` waits for the GPU."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)  # pinned memory, if from a GPU
        self._end = torch.cuda.Event() if values.is_cuda else None
        if self._end is not None:
            self._end.record()

    def read(self) -> Tensor:
        """Return the values once they have arrived."""
        if self._end is not None:
            self._end.synchronize()
        return self._values


class PendingStep(NamedTuple):
    """Training step whose results may still be on the GPU.

    Args:
        number: number of the step in the epoch, from 1.
        lr: learning rate of the update.
        parts: images (N, C, H, W) of each micro-batch that this rank has.
        results: four sums of each micro-batch, see `EpochMetrics`; the number of ranks that ask to
            stop; and the largest gradient.
    """

    number: int
    lr: float
    parts: Sequence[Tensor]
    results: HostCopy


class StepReader:
    """Checks, counts and reports training steps; the end of the context reads the last one.

    At most one step is pending. Its gradients stay until `read`, for `find_nonfinite`.

    Args:
        optimizer: holds the gradients.
        epoch_metrics: receives the sums of each step.
        on_batch: receives the number and the metrics of each step.
        title: first words of an error.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        epoch_metrics: EpochMetrics,
        on_batch: Callable[[int, Metrics], None],
        title: str,
    ) -> None:
        self.optimizer, self.epoch_metrics = optimizer, epoch_metrics
        self.on_batch, self.title = on_batch, title
        self._pending: PendingStep | None = None

    def __enter__(self) -> StepReader:
        self.optimizer.zero_grad()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None or issubclass(kind, DataError):  # the steps before a bad file stand
            self.read()

    def add(self, step: PendingStep) -> None:
        """Keep a step for `read`."""
        self._pending = step

    def read(self) -> bool:
        """Read the pending step, if there is one; return True if a rank asks to stop.

        Raises:
            TrainingDiverged: its loss or a gradient is not finite.
        """
        step, self._pending = self._pending, None
        if step is None:
            return False
        results = step.results.read()
        rows = results[:-2].reshape(-1, 4)
        stops, largest = results[-2:].tolist()
        row = rows.sum(0)
        metrics = average_rows([row])
        for name, value in (("loss", metrics["loss"]), ("largest gradient", largest)):
            if metrics["images"] and not math.isfinite(value):
                message = f"{self.title}, batch {step.number}: the {name} is {value:g}"
                bad = int(rows.isfinite().all(1).int().argmin())  # else the first
                raise TrainingDiverged(message, step.number, step.parts[bad])
        self.optimizer.zero_grad()
        self.epoch_metrics.add(row, step.lr)
        times = {"lr": step.lr, "seconds": self.epoch_metrics.seconds}
        self.on_batch(step.number, {**metrics, **times})
        return stops > 0
