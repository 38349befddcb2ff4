"""Statistics that the ranks of a process group share."""

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
    """Ranks that share the statistics of a forward, and this rank's part of their batch.

    Args:
        group: the ranks; None: all.
        images: index of this rank's first image in the batch of all these ranks, and their number
            of images; None: every rank holds equally many.
    """

    group: distributed.ProcessGroup | None
    images: tuple[int, int] | None = None

    def locate(self, count: int) -> tuple[int, int]:
        """Return the index of the first of this rank's `count` images, and the total count."""
        if self.images is not None:
            return self.images
        rank, size = distributed.get_rank(self.group), distributed.get_world_size(self.group)
        return rank * count, size * count


_asked: BatchShare | None = None  # set by `batch_share`


@contextmanager
def batch_share(
    first: int, total: int, group: distributed.ProcessGroup | None = None
) -> Iterator[None]:
    """Share statistics over ranks, and tell which images of their batch this rank holds.

    Layers inside this context also share where no DistributedDataParallel runs. A layer with a
    `process_group` shares over its own group.

    With few patches per image, the positions depend on the image's index in the batch of all ranks.
    By default a layer assumes that all ranks hold as many images as its own. Shares of the last
    batch of an epoch may differ. Without the indices the statistics of unequal shares still cover
    all ranks, but other patches than one rank with the whole batch would sample.

    Args:
        first: index of this rank's first image in the batch of all ranks.
        total: number of images in that batch.
        group: ranks that share (default None: the group of the DistributedDataParallel that runs,
            else all ranks). All of them must run the layers, or the others wait for ever.

    Raises:
        ValueError: this rank is not in the group.

    Example:
        with batch_share(first=64 * rank, total=64 * world_size):
            loss = criterion(model(images), labels)
    """
    global _asked
    require_group("group", group)
    previous, _asked = _asked, BatchShare(group, (first, total))
    try:
        yield
    finally:
        _asked = previous


def find_share(process_group: distributed.ProcessGroup | None) -> BatchShare | None:
    """Return the ranks that share the statistics of a forward that runs now; None for one rank.

    The `process_group` of a layer precedes the group of `batch_share`. Both precede the group of
    the DistributedDataParallel that runs.

    Raises:
        RuntimeError: a DistributedDataParallel may run, but torch hides it.
    """
    group, images = process_group, None
    if _asked is not None:
        group, images = process_group or _asked.group, _asked.images
    if group is None:
        if not (distributed.is_available() and distributed.is_initialized()):
            return None
        group = _find_ddp_group()
        if group is None and _asked is None:
            if reason := _explain_hidden_ddp():
                raise RuntimeError(f"{reason}: give the layers a process_group or sync_stats=False")
            return None
    return BatchShare(group, images) if distributed.get_world_size(group) > 1 else None


def _find_ddp_group() -> distributed.ProcessGroup | None:
    """Return the process group of the DistributedDataParallel whose forward runs.

    Only a private method of torch knows. Its absence must not end sharing silently.
    """
    find_active = getattr(DistributedDataParallel, "_get_active_ddp_module", None)
    if find_active is None:
        raise RuntimeError(
            f"torch {torch.__version__} does not tell which DistributedDataParallel runs: give the "
            "layers a process_group or sync_stats=False"
        )
    ddp = find_active()
    return None if ddp is None else ddp.process_group


def _explain_hidden_ddp() -> str:
    """Return why a DistributedDataParallel may be out of sight, or "".

    Compiled code calls this function only while it is compiled.
    """
    if distributed.get_world_size() == 1:
        return ""
    if torch._C._current_graph_task_id() != -1:  # in a backward
        return "gradient checkpointing runs compiled layers again, without DistributedDataParallel"
    compiler = sys.modules.get("torch._dynamo")
    if compiler is not None and compiler.config.optimize_ddp == "python_reducer":
        return 'optimize_ddp="python_reducer" hides DistributedDataParallel'
    return ""


# As `torch.compiler.assume_constant_result` does, which imports the compiler.
_explain_hidden_ddp._dynamo_marked_constant = True  # type: ignore[attr-defined]


def require_group(name: str, group: Any) -> None:
    """Raise ValueError unless `group` is None or a process group that holds this rank."""
    if group is not None and not isinstance(group, distributed.ProcessGroup):
        raise ValueError(
            f"{name} must be a process group that holds this rank, or None, got {group!r} "
            "(new_group returns a number on the ranks that it leaves out)"
        )


class GroupHandle:
    """Process group of a layer, the same for deep copies of the layer. Torch copies no group."""

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
        group: the ranks; None: all.
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

    Every rank sends M * [1, means]. The sum is divided by its first element. A rank without
    patches has weight 0 but must take part, as in every collective operation.

    The gradient is that of the sum of all ranks' losses, in one message of the same size. Summed
    over ranks, parameter gradients equal those of one rank with all patches. (DDP averages them:
    they then belong to the average loss.)

    Args:
        count: M, patches of this rank.
        means: averages over the patches of this rank, of equal shapes on all ranks; finite for
            M = 0.
        group: the ranks (default None: all).

    Returns:
        M of all ranks, (), and the averages over their patches, 0 for no patches at all.
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
        return total.view_as(total)  # compiled code loses the gradient of a tensor written in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(grad, ctx.group), None
