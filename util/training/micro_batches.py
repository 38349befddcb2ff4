"""Split a batch into micro-batches, which are forwarded one after the other to save memory."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from util.errors import RunError


class MicroBatch(NamedTuple):
    """A micro-batch: `own`, this rank's images; `offset` images of lower ranks; `total` images."""

    own: slice
    offset: int
    total: int


def split_batch(offset: int, total: int, limit: int | None) -> list[MicroBatch]:
    """Split a batch into the fewest micro-batches of at most `limit` images, equal up to one image.

    Of n micro-batches, number i has the images i, i + n, i + 2n, ... of the batch. Any number of
    ranks therefore makes the same micro-batches.

    Args:
        offset: images of lower ranks in the batch.
        total: images of all ranks in the batch.
        limit: most images of all ranks in a micro-batch; None: no limit.
    """
    count = 1 if limit is None else max(1, math.ceil(total / limit))
    return [
        MicroBatch(
            slice((first - offset) % count, None, count),
            len(range(first, offset, count)),
            len(range(first, total, count)),
        )
        for first in range(count)
    ]


def average_gradients(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Return the context of a forward and a backward; only the `last` sends gradients to ranks."""
    is_replicated = isinstance(model, DistributedDataParallel)
    return model.no_sync() if is_replicated and not last else nullcontext()


def check_batch_size(
    model: nn.Module,
    images: int,
    batch_size: int,
    world_size: int = 1,
    accum_steps: int = 1,
    *,
    allow_rest: bool = False,
) -> None:
    """Raise RunError if a rank gets too few images of a micro-batch: none, or one for BatchNorm1d.

    Other kinds of BatchNorm may train on single images. Among larger batches, a single image must
    not be the last batch of an epoch: it would weigh as much as all images of another batch.

    Args:
        model: the network.
        images: number of training images.
        batch_size: images per step, over all ranks.
        world_size: number of ranks.
        accum_steps: micro-batches per step.
        allow_rest: True accepts a single image as the rest of an epoch, except for BatchNorm1d.
    """
    if batch_size < world_size * accum_steps:
        parts = f"{world_size} processes" if world_size > 1 else ""
        parts += " x " if world_size > 1 and accum_steps > 1 else ""
        parts += f"--accum-steps {accum_steps}" if accum_steps > 1 else ""
        raise RunError(f"--batch-size {batch_size}: fewer images than the {parts}")
    last = images % batch_size or batch_size
    micro_batches = split_batch(0, last, math.ceil(batch_size / accum_steps))
    smallest = min(part.total for part in micro_batches)
    has_single = {
        nn.BatchNorm1d: 1 in (smallest // world_size, -(-smallest // world_size)),
        nn.modules.batchnorm._BatchNorm: last == 1 < batch_size and not allow_rest,
    }
    kinds = tuple(kind for kind, single in has_single.items() if single)
    for norm in (module for module in model.modules() if isinstance(module, kinds)):
        parts = f", split over {world_size} processes" if world_size > 1 else ""
        parts += f" in {len(micro_batches)} micro-batches" if accum_steps > 1 else ""
        raise RunError(
            f"--batch-size {batch_size}: the last batch of {images} images has {last}{parts}; a "
            f"single image is too few for {type(norm).__name__}; choose another size or "
            "--batchnorm False"
        )
