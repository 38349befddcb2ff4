"""Numbers about training: accuracy, memory."""

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

Metrics = dict[str, float]


def _average(rows: list[Tensor]) -> Metrics:
    """loss, top1, top5 (percent) and images of rows of sums; NaN where there is no image."""
    columns = zip(*torch.stack(rows).tolist(), strict=True) if rows else [[]] * 4
    images, loss, top1, top5 = (_exact_sum(column) for column in columns)
    count = images or math.nan
    percent = {"top1": 100 * top1 / count, "top5": 100 * top5 / count}
    return {"loss": loss / count, **percent, "images": int(images)}


def _exact_sum(values: list[float]) -> float:
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # infinities of both signs
        return math.nan


class EpochMetrics:
    """An epoch so far: a row of sums for each batch, and seconds.

    Args:
        state: what `state_dict` gave, to go on from; None: nothing so far.

    Attributes:
        lr: the rate of the last step; NaN before the first.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"rows": torch.zeros(0, 4), "lr": math.nan, "seconds": 0.0}
        self.rows: list[Tensor] = list(state["rows"])
        self.lr: float = state["lr"]
        self._before, self._start = state["seconds"], None
        self.next_show = 0.0  # in seconds since the start

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._table(), "lr": self.lr, "seconds": self.seconds}

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The block's seconds count."""
        self._start = time.perf_counter()
        try:
            yield
        finally:
            self._before, self._start = self.seconds, None

    def add(self, row: Tensor, lr: float = math.nan) -> None:
        self.rows.append(row)
        self.lr = lr

    @property
    def steps(self) -> int:
        return len(self.rows)

    @property
    def seconds(self) -> float:
        running = 0.0 if self._start is None else time.perf_counter() - self._start
        return self._before + running

    def figures(self, world: World = World()) -> Metrics:  # noqa: B008 - frozen
        """The averages so far, over the rows of all processes of `world`."""
        rows = [row for part in world.gather(self._table()) for row in part]
        return {**_average(rows), "seconds": self.seconds}

    def training_metrics(self) -> Metrics:
        """The averages so far, how many steps they are of, and the rate of the last."""
        return {**self.figures(), "steps": self.steps, "lr": self.lr}

    def _table(self) -> Tensor:
        return torch.stack(self.rows).cpu() if self.rows else torch.zeros(0, 4)


try:
    import resource
except ImportError:  # Windows has no such module; the peak is then unknown
    resource = None


def count_hits(logits: Tensor, targets: Tensor, topk: Sequence[int] = (1, 5)) -> list[Tensor]:
    """How many images have their class among the k largest logits, for each k.

    Args:
        logits: (N, classes).
        targets: (N,) class numbers.
        topk: the values of k; one above the number of classes counts as that number.

    Returns:
        One float64 scalar per k, on the device of `logits`, which is not waited for.
    """
    largest = min(max(topk), logits.shape[1])
    hits = logits.topk(largest, dim=1).indices == targets[:, None]  # N largest
    return [hits[:, :k].sum(dtype=torch.float64) for k in topk]


def peak_memory_mb(device: torch.device | str) -> float:
    """Largest memory so far, in MiB: the tensors on a CUDA device, or all of this process on a CPU.

    NaN where the system does not tell.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB elsewhere
