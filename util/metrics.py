"""Numbers about training: accuracy, memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # Windows has no such module; the peak is then unknown
    resource = None


def count_hits(logits: Tensor, targets: Tensor, topk: Sequence[int] = (1, 5)) -> list[Tensor]:
    """How many pictures have their class among the k largest logits, for each k.

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
