"""Statistics that all ranks of a process group share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from .ops.blocks import Blocks, transform_along
from .ops.covariance import Statistics, second_moment


def is_distributed() -> bool:
    """Return True if torch.distributed is initialised with more than one rank."""
    initialized = distributed.is_available() and distributed.is_initialized()
    return initialized and distributed.get_world_size() > 1


_batch: tuple[int, int] | None = None  # set by `batch_share`


@contextmanager
def batch_share(first: int, total: int) -> Iterator[None]:
    """Tell the layers inside this context which images of the global batch this rank holds.

    With few patches per image, the positions depend on the image's index in the global batch. By
    default a layer assumes that all ranks hold as many images as its own. Shares of the last batch
    of an epoch may differ. Without this context the statistics of unequal shares still cover all
    ranks, but other patches than one rank with the whole batch would sample.

    Args:
        first: index of this rank's first image in the global batch.
        total: number of images in the global batch.

    Example:
        with batch_share(first=64 * rank, total=64 * world_size):
            loss = criterion(model(images), labels)
    """
    global _batch
    previous, _batch = _batch, (first, total)
    try:
        yield
    finally:
        _batch = previous


def locate_batch(count: int) -> tuple[int, int]:
    """Return the global index of the first of this rank's `count` images, and the global count."""
    if _batch is not None:
        return _batch
    return distributed.get_rank() * count, distributed.get_world_size() * count


def pool_statistics(
    stats: Statistics,
    blocks: Blocks,
    axis: str,
    whitened: tuple[str, Tensor] | None,
    reference: Tensor | None,
) -> Statistics:
    """Return the statistics over the patches of all ranks, in one message.

    Second moments about a common point add up. The running mean is such a point. The batch mean
    lies close to it, so that subtracting the shift between the two cancels few digits. (Before the
    first batch the running mean is 0, and an offset of hundreds of standard deviations cancels.)

    Each rank weighs by its images times the positions of its grid, however few it samples. The
    length of the message depends on the layer alone, as ranks may hold images of different size.

    Args:
        stats: statistics of this rank.
        blocks: the view of a patch as blocks.
        axis: as in `mean_and_covariance`.
        whitened: as in `mean_and_covariance`.
        reference: (C*T,), equal on all ranks; None for 0.
    """
    centre = stats.centre
    reference = torch.zeros_like(centre) if reference is None else reference
    offset = (centre - reference)[None, :, None]
    if whitened is not None:
        offset = transform_along(whitened[0], offset, whitened[1], blocks)
    moment = stats.cov + second_moment(offset, axis, blocks)
    count, shift, moment, mean = average_over_ranks(stats.patches, offset, moment, stats.mean)
    cov = moment - second_moment(shift, axis, blocks)
    return stats._replace(patches=count, mean=mean, cov=cov)


def average_over_ranks(count: int | Tensor, *means: Tensor) -> tuple[Tensor, ...]:
    """Return weighted averages over all ranks, in one message.

    Every rank sends M * [1, means]. The sum is divided by its first element. A rank without
    patches has weight 0 but must take part, as in every collective operation.

    The gradient is that of the sum of all ranks' losses, in one message of the same size. Summed
    over ranks, parameter gradients equal those of one rank with all patches. (DDP averages them:
    they then belong to the average loss.)

    Args:
        count: M, patches of this rank.
        means: averages over the patches of this rank, of equal shapes on all ranks; finite for
            M = 0.

    Returns:
        M of all ranks, (), and the averages over their patches, 0 for no patches at all.
    """
    parts = [mean.flatten() for mean in (means[0].new_ones(()), *means)]
    total, *sums = _SumOverRanks.apply(count * torch.cat(parts)).split([p.numel() for p in parts])
    averages = (part / total.clamp(min=1) for part in sums)
    reshaped = (part.reshape(mean.shape) for part, mean in zip(averages, means, strict=True))
    return total.squeeze(0), *reshaped


class _SumOverRanks(torch.autograd.Function):
    """Sum of all ranks' tensors, whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total.view_as(total)  # compiled code loses the gradient of a tensor written in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _SumOverRanks.apply(grad)
