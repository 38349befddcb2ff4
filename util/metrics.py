"""Numbers about training: accuracy, averages over an epoch, memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # Windows has no such module; the peak is then unknown
    resource = None


def accuracy(logits: Tensor, targets: Tensor, topk: Sequence[int] = (1, 5)) -> list[Tensor]:
    """Percentage of pictures whose class is among the k largest logits, for each k.

    Args:
        logits: (N, classes).
        targets: (N,) class numbers.
        topk: the values of k; one above the number of classes counts as that number.

    Returns:
        One float64 scalar per k, in percent, on the device of `logits`, which is not waited for.
    """
    largest = min(max(topk), logits.shape[1])
    hits = logits.topk(largest, dim=1).indices == targets[:, None]  # N largest
    return [100 * hits[:, :k].any(dim=1).double().mean() for k in topk]


class Average:
    """Mean of values weighted by the pictures behind each.

    Tensors are summed where they are, in float64; only `value` waits for the device.
    """

    def __init__(self) -> None:
        self._total: float | Tensor = 0.0
        self._count = 0

    def update(self, value: Tensor | float, n: int = 1) -> None:
        """Add `value`, the mean over `n` pictures."""
        value = value.detach().double() if isinstance(value, Tensor) else value
        self._total = self._total + value * n
        self._count += n

    @property
    def value(self) -> float:
        """The mean so far; NaN before the first update."""
        return float(self._total) / self._count if self._count else float("nan")


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
