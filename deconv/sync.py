"""Share batch statistics between the ranks of a process group."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from .ops.blocks import Blocks, transform_along
from .ops.covariance import Statistics, second_moment


class BatchShare(NamedTuple):
    """Ranks that share the statistics of a forward, and this rank's images in their batch.

    Args:
        group: process group of the ranks; None: all ranks.
        images: index of this rank's first image in the shared batch, and the number of images in
            the shared batch. None: all ranks have equally many images.
    """

    group: distributed.ProcessGroup | None
    images: tuple[int, int] | None = None

    def locate(self, count: int) -> tuple[int, int]:
        """Return the index of this rank's first image and the number of images of all ranks."""
        if self.images is not None:
            return self.images
        rank, size = distributed.get_rank(self.group), distributed.get_world_size(self.group)
        return rank * count, size * count


_requested: BatchShare | None = None  # set by `batch_share`


@contextmanager
def batch_share(
    first: int, total: int, group: distributed.ProcessGroup | None = None
) -> Iterator[None]:
    """Share batch statistics between ranks and set this rank's position in the shared batch.

    Layers inside this context share without DistributedDataParallel as well. A layer with a
    `process_group` shares over its own group.

    With few patches per image, the sampled positions depend on the image's index in the shared
    batch. Outside this context, a layer assumes that all ranks have equally many images. The last
    batch of an epoch may be divided unequally. The statistics then still cover all ranks, but not
    the patches that one rank with the whole batch would sample.

    Args:
        first: index of this rank's first image in the shared batch.
        total: number of images in the shared batch.
        group: ranks that share. None (default): the group of the active DistributedDataParallel, or
            else all ranks. Every rank of the group must run the layers; the others wait otherwise.

    Raises:
        ValueError: this rank is not in `group`.

    Example:
        with batch_share(first=64 * rank, total=64 * world_size):
            loss = criterion(model(images), labels)
    """
    global _requested
    require_group("group", group)
    previous, _requested = _requested, BatchShare(group, (first, total))
    try:
        yield
    finally:
        _requested = previous


def find_share(process_group: distributed.ProcessGroup | None) -> BatchShare | None:
    """Return the ranks that share the statistics of the current forward; None for this rank alone.

    The `process_group` of a layer takes precedence over the group of `batch_share`. Both take
    precedence over the group of the active DistributedDataParallel.

    Raises:
        RuntimeError: torch does not reveal whether a DistributedDataParallel is active.
    """
    group, images = process_group, None
    if _requested is not None:
        group, images = process_group or _requested.group, _requested.images
    if group is None:
        if not (distributed.is_available() and distributed.is_initialized()):
            return None
        group = find_ddp_group()
        if group is None and _requested is None:
            if reason := _explain_hidden_ddp():
                raise RuntimeError(f"{reason}: give the layers a process_group or sync_stats=False")
            return None
    return BatchShare(group, images) if distributed.get_world_size(group) > 1 else None


def find_ddp_group() -> distributed.ProcessGroup | None:
    """Return the process group of the active DistributedDataParallel, or None.

    Torch has no public function for it. If the private one is missing, sharing must not stop
    silently.
    """
    find_active = getattr(DistributedDataParallel, "_get_active_ddp_module", None)
    if find_active is None:
        raise RuntimeError(
            f"torch {torch.__version__} does not reveal the active DistributedDataParallel: give "
            "the layers a process_group or sync_stats=False"
        )
    ddp = find_active()
    return None if ddp is None else ddp.process_group


def _explain_hidden_ddp() -> str:
    """Return the reason why an active DistributedDataParallel may be undetected, or "".

    Compiled code evaluates this function once, at compile time.
    """
    if distributed.get_world_size() == 1:
        return ""
    if torch._C._current_graph_task_id() != -1:  # in a backward
        return "activation checkpointing recomputes compiled layers outside DistributedDataParallel"
    compiler = sys.modules.get("torch._dynamo")
    if compiler is not None and compiler.config.optimize_ddp == "python_reducer":
        return 'optimize_ddp="python_reducer" hides DistributedDataParallel'
    return ""


# `torch.compiler.assume_constant_result` does the same, but imports the compiler.
_explain_hidden_ddp._dynamo_marked_constant = True  # type: ignore[attr-defined]


def require_group(name: str, group: Any) -> None:
    """Raise ValueError unless `group` is None or a process group that contains this rank."""
    if group is not None and not isinstance(group, distributed.ProcessGroup):
        raise ValueError(
            f"{name} must be None or a process group that contains this rank, got {group!r}: "
            "new_group returns a number on ranks outside the group"
        )


class GroupHandle:
    """Process group that deep copies of a layer share, since torch cannot copy a group."""

    def __init__(self, group: distributed.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupHandle:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a layer with a process_group cannot be pickled: save its state_dict, or set its "
            "process_group to None first"
        )


def pool_statistics(
    stats: Statistics,
    blocks: Blocks,
    axis: str,
    whitened: tuple[str, Tensor] | None,
    reference: Tensor | None,
    group: distributed.ProcessGroup | None,
) -> Statistics:
    """Return the statistics over the patches of all ranks of `group`, in one message.

    Second moments about a common point add up. The running mean is such a point. The batch mean is
    close to it, so the correction for their difference cancels few digits. (The running mean is 0
    before the first batch. An offset of hundreds of standard deviations then cancels many digits.)

    The weight of a rank is its number of images times the positions of its grid, however few it
    samples. The message length depends on the layer alone, because image sizes may differ between
    ranks.

    Args:
        stats: statistics of this rank.
        blocks: the view of a patch as blocks.
        axis: as in `mean_and_covariance`.
        whitened: as in `mean_and_covariance`.
        reference: the common point, (C*T,), equal on all ranks; None: 0.
        group: the ranks; None: all ranks.
    """
    centre = stats.centre
    reference = torch.zeros_like(centre) if reference is None else reference
    offset = (centre - reference)[None, :, None]
    if whitened is not None:
        offset = transform_along(whitened[0], offset, whitened[1], blocks)
    moment = stats.cov + second_moment(offset, axis, blocks)
    means = offset, moment, stats.mean
    count, shift, moment, mean = average_over_ranks(stats.patches, *means, group=group)
    cov = moment - second_moment(shift, axis, blocks)
    return stats._replace(patches=count, mean=mean, cov=cov)


def average_over_ranks(
    count: int | Tensor, *means: Tensor, group: distributed.ProcessGroup | None = None
) -> tuple[Tensor, ...]:
    """Return weighted averages over all ranks of `group`, in one message.

    Each rank sends M * [1, means]. The sum is divided by its first element. A rank without patches
    has weight 0 but must participate, as in every collective operation.

    The gradient is that of the sum of all ranks' losses, in one message of the same size. Summed
    over ranks, parameter gradients equal those of one rank with all patches. (DDP averages
    gradients over ranks. They are then the gradients of the average loss.)

    Args:
        count: M, patches of this rank.
        means: averages over the patches of this rank, of equal shapes on all ranks; finite for
            M = 0.
        group: the ranks (default None: all ranks).

    Returns:
        M of all ranks, (), and the averages over their patches; 0 if no rank has patches.
    """
    parts = [mean.flatten() for mean in (means[0].new_ones(()), *means)]
    message = _SumOverRanks.apply(count * torch.cat(parts), group)
    total, *sums = message.split([p.numel() for p in parts])
    averages = (part / total.clamp(min=1) for part in sums)
    reshaped = (part.reshape(mean.shape) for part, mean in zip(averages, means, strict=True))
    return total.squeeze(0), *reshaped


class _SumOverRanks(torch.autograd.Function):
    """Sum of the ranks' tensors, whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: distributed.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total.view_as(total)  # compiled code loses the gradient of an in-place result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(grad, ctx.group), None
