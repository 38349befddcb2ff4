"""Read the results of training steps one step late, so that no step waits for the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

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
        parameters: parameters that have a gradient.
        results: four sums of each micro-batch, see `EpochMetrics`; the number of ranks that ask to
            stop; and the largest magnitude of the gradient of each parameter.
    """

    number: int
    lr: float
    parts: Sequence[Tensor]
    parameters: Sequence[Tensor]
    results: HostCopy


class StepReader:
    """Checks, counts and reports training steps; the end of the context reads the last one.

    At most one step is pending.

    Args:
        epoch_metrics: receives the sums of each step.
        on_batch: receives the number and the metrics of each step.
        title: first words of an error.
    """

    def __init__(
        self, epoch_metrics: EpochMetrics, on_batch: Callable[[int, Metrics], None], title: str
    ) -> None:
        self.epoch_metrics, self.on_batch, self.title = epoch_metrics, on_batch, title
        self._pending: PendingStep | None = None

    def __enter__(self) -> StepReader:
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
        results, sums = step.results.read(), 4 * len(step.parts)
        rows, stops, largest = results[:sums].reshape(-1, 4), results[sums], results[sums + 1 :]
        row = rows.sum(0)
        metrics = average_rows([row])
        for name, value in (("loss", metrics["loss"]), ("largest gradient", float(largest.max()))):
            if metrics["images"] and not math.isfinite(value):
                message = f"{self.title}, batch {step.number}: the {name} is {value:g}"
                images = step.parts[int(rows.isfinite().all(1).int().argmin())]  # else the first
                pairs = zip(step.parameters, largest.isfinite(), strict=True)
                bad = [parameter for parameter, is_finite in pairs if not is_finite]
                raise TrainingDiverged(message, step.number, images, bad)
        self.epoch_metrics.add(row, step.lr)
        times = {"lr": step.lr, "seconds": self.epoch_metrics.seconds}
        self.on_batch(step.number, {**metrics, **times})
        return bool(stops)
