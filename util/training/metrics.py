"""Training metrics: loss, accuracy in percent, seconds, peak memory."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from util.distributed.world import World

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

Metrics = dict[str, float]


class EpochMetrics:
    """Accumulated metrics of one epoch: a row of sums per batch, and seconds.

    Args:
        state: result of `state_dict`, to continue an epoch; None: an empty epoch.

    Attributes:
        rows: sums (4,) of each batch: images, loss, top1 hits and top5 hits.
        lr: learning rate of the last step; NaN before the first.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"rows": torch.zeros(0, 4), "lr": math.nan, "seconds": 0.0}
        self.rows: list[Tensor] = list(state["rows"])
        self.lr: float = state["lr"]
        self._seconds_before, self._start = state["seconds"], None

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors for a checkpoint."""
        return {"rows": self._table(), "lr": self.lr, "seconds": self.seconds}

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time of the block to `seconds`."""
        self._start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds_before, self._start = self.seconds, None

    def add(self, row: Tensor, lr: float = math.nan) -> None:
        """Add the row of a batch, trained at the rate `lr`."""
        self.rows.append(row)
        self.lr = lr

    def fetch(self) -> None:
        """Move the rows to host memory, which waits for a GPU."""
        self.rows = list(self._table())

    @property
    def steps(self) -> int:
        """Number of batches so far."""
        return len(self.rows)

    @property
    def seconds(self) -> float:
        """Time within `timed` so far."""
        running = 0.0 if self._start is None else time.perf_counter() - self._start
        return self._seconds_before + running

    def average(self, world: World = World()) -> Metrics:  # noqa: B008 - frozen
        """Return loss, top1, top5, images and seconds so far, over all ranks of `world`."""
        rows = [row for table in world.gather(self._table()) for row in table]
        return {**average_rows(rows), "seconds": self.seconds}

    def training_metrics(self) -> Metrics:
        """Return the average so far, the number of steps and the rate of the last step."""
        return {**self.average(), "steps": self.steps, "lr": self.lr}

    def _table(self) -> Tensor:
        return torch.stack(self.rows).cpu() if self.rows else torch.zeros(0, 4)


def average_rows(rows: Sequence[Tensor]) -> Metrics:
    """Return loss, top1, top5 and images of rows in any order; NaN without an image."""
    columns = zip(*torch.stack(list(rows)).tolist(), strict=True) if rows else [[]] * 4
    images, loss, top1, top5 = (_exact_sum(column) for column in columns)
    count = images or math.nan
    percent = {"top1": 100 * top1 / count, "top5": 100 * top5 / count}
    return {"loss": loss / count, **percent, "images": int(images)}


def _exact_sum(values: Sequence[float]) -> float:
    """Return a sum that does not depend on the order of the values."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # infinities of both signs
        return math.nan


def count_hits(logits: Tensor, targets: Tensor, topk: Sequence[int] = (1, 5)) -> list[Tensor]:
    """Count the images whose class is among the k largest logits, for each k of `topk`.

    `logits` are (N, classes), `targets` (N,); a k may exceed the number of classes. Of targets
    (N, classes), the class is that of the largest share. Each count is a float64 scalar on the
    device of `logits`.
    """
    targets = targets.argmax(1) if targets.ndim == 2 else targets
    hits = rank_classes(logits, max(topk)) == targets[:, None]  # N largest
    return [hits[:, :k].sum(dtype=torch.float64) for k in topk]


def rank_classes(logits: Tensor, count: int = 5) -> Tensor:
    """Return the classes of the `count` largest logits (N, classes), in order: (N, count) int64.

    There are fewer columns if there are fewer classes.
    """
    return logits.topk(min(count, logits.shape[1]), dim=1).indices


def peak_memory_mb(device: torch.device | str) -> float:
    """Return the peak memory in MiB: of tensors on a CUDA device, of the process on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB elsewhere
