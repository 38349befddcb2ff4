"""TODO: deconv/sync.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed


def several_processes() -> bool:
    """Whether this process is one of several that torch.distributed has brought together."""
    initialized = distributed.is_available() and distributed.is_initialized()
    return initialized and distributed.get_world_size() > 1


_share: tuple[int, int] | None = None


@contextmanager
def batch_share(first: int, total: int) -> Iterator[None]:
    """Within it, layers see images `first`, `first` + 1, ... of a batch of `total`.

    Of several processes each looks at other positions of its images, and at so many that all
    together have enough. Without being told, a layer takes all shares to be as large as its own.
    With unequal ones, as of the last batch of an epoch, statistics are still those of all
    processes, but of other patches than one process would have looked at.
    """
    global _share
    before, _share = _share, (first, total)
    try:
        yield
    finally:
        _share = before


def find_share(count: int) -> tuple[int, int]:
    """Number of the first of this process's `count` images, and images of all processes."""
    if _share is not None:
        return _share
    return distributed.get_rank() * count, distributed.get_world_size() * count


def average_across(count: int, *means: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Averages over the rows of all processes from the averages over each one's: one message.

    Every process sends M * [1, means], and the sum is divided by its first element. A process
    without rows weighs nothing, but must take part, as in every collective.

    The gradient is that of the sum of all processes' losses: backward adds up, in one message of
    the same size, what the averages of all rows are worth to each process's loss. Parameter
    gradients then need only be added too, to be those of one process with all rows. (DDP divides
    them by the number of processes: they are those of the average loss.)

    Args:
        count: M, rows of this process.
        means: any shapes, the same in all processes; finite where M is 0.

    Returns:
        M of all processes together, (), and the averages, 0 for no rows at all.
    """
    parts = [mean.flatten() for mean in (means[0].new_ones(()), *means)]
    total, *sums = _SumAcross.apply(count * torch.cat(parts)).split([p.numel() for p in parts])
    averages = (part / total.clamp(min=1) for part in sums)
    reshaped = (part.reshape(mean.shape) for part, mean in zip(averages, means, strict=True))
    return total.squeeze(0), *reshaped


class _SumAcross(torch.autograd.Function):
    """The sum of all processes' tensors; so is its gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total.view_as(total)  # not what was written into: see _sum_products

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return _SumAcross.apply(grad)
