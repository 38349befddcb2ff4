"""Update the running statistics of many layers in a few kernel launches."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops.constants import Constants, cache_constants


class Update(NamedTuple):
    """Statistics of a batch, for the running statistics of a layer.

    Args:
        layer: the `Whitening` that owns the running statistics.
        patches: number of patches of the batch; a tensor if only the device knows.
        bias: the folded bias. It sums over all of mu and D. It is finite if they are, and D is NaN
            if a covariance is not finite.
        news: statistics of the batch, in the order of `layer.running_buffers()`.
    """

    layer: Any
    patches: int | Tensor
    bias: Tensor
    news: tuple[Tensor, ...]


class _Collector(threading.local):
    """Updates that wait for the end of the context in this thread; None outside any context."""

    waiting: list[Update] | None = None
    on_cpu = False


_collector = _Collector()


@contextmanager
def group_statistics(on_cpu: bool = False) -> Iterator[None]:
    """Update the running statistics of all layers at once, at the end of this context.

    The running statistics are the same as without the context. On a GPU, 15 kernels replace nine
    for each layer. Buffers stay unchanged until the end of the context. A second forward of a
    layer, or reading its state_dict, applies the waiting updates first. An exception discards the
    updates. Compiled layers update their statistics themselves.

    Put the context around forwards only. A CUDA graph must contain the whole context.

    Args:
        on_cpu: group layers on the CPU as well (default False: it saves no time there).

    Example:
        with group_statistics():
            loss = criterion(model(images), labels)
        loss.backward()
    """
    if _collector.waiting:  # of an outer context, for the same layers perhaps
        _apply_waiting()
    before = _collector.waiting, _collector.on_cpu
    _collector.waiting, _collector.on_cpu = [], on_cpu
    try:
        yield
        _apply_waiting()
    finally:
        _collector.waiting, _collector.on_cpu = before


def collect(update: Update) -> bool:
    """Keep an update until the end of the context; return False if the layer must apply it."""
    if torch.compiler.is_compiling() or _collector.waiting is None:
        return False
    if update.bias.device.type == "cpu" and not _collector.on_cpu:
        return False
    _collector.waiting.append(update)
    return True


def settle(layer: Any) -> None:
    """Apply all waiting updates if one of them is for `layer`."""
    if torch.compiler.is_compiling() or not _collector.waiting:
        return
    if any(update.layer is layer for update in _collector.waiting):
        _apply_waiting()


def per_patch(norm: Tensor, count: int | Tensor) -> Tensor:
    """Return a norm of the folded bias, divided by the number of patches unless they are known."""
    return norm if isinstance(count, int) and count else norm / count


def are_usable(norms: Tensor) -> Tensor:
    """Return True for finite norms: neither NaN nor divided by 0 patches."""
    return norms < math.inf


def weigh_batch(tracked: Tensor, momentum: float | None, replaces: bool, like: Tensor) -> Tensor:
    """Return the weight of a batch in running statistics, in the dtype of `like`.

    Args:
        tracked: number of earlier batches, of any shape.
        momentum: weight of a batch; None: the mean of all batches.
        replaces: the first batch replaces the initial values.
        like: a running statistic.
    """
    step = like.new_empty(tracked.shape)  # float64 in a float64 layer
    if momentum is None:
        return torch.add(tracked, 1, out=step).reciprocal_()
    if not replaces:
        return step.fill_(momentum)
    return torch.eq(tracked, 0, out=step).clamp_(min=momentum)


def _apply_waiting() -> None:
    updates, _collector.waiting = _collector.waiting or [], []

    def kind(update: Update) -> tuple[str, str, str, bool]:
        layer, mean = update.layer, update.layer.running_mean
        return str(mean.device), str(mean.dtype), str(layer.momentum), layer.replaces_initial

    for _, group in groupby(sorted(updates, key=kind), kind):
        _apply_together(list(group))


@torch.no_grad()
def _apply_together(updates: list[Update]) -> None:
    """Apply updates of layers that agree in device, dtype and weight of a batch."""
    first = updates[0].layer
    counters = [update.layer.num_batches_tracked for update in updates]
    buffers = [update.layer.running_buffers() for update in updates]
    tracked = torch.stack(counters)
    norms = torch._foreach_norm([update.bias.to(update.news[0].dtype) for update in updates], 1)
    totals = zip(norms, updates, strict=True)
    usable = are_usable(torch.stack([per_patch(norm, update.patches) for norm, update in totals]))
    step = weigh_batch(tracked, first.momentum, first.replaces_initial, buffers[0][0])
    sizes = tuple(sum(buffer.numel() for buffer in own) for own in buffers)
    owner = _number_owners(sizes, like=step)[0]
    olds = [buffer for own in buffers for buffer in own]
    old = torch.cat([buffer.flatten() for buffer in olds])
    new = torch.cat([new.flatten().to(old.dtype) for update in updates for new in update.news])
    new = torch.where(usable.index_select(0, owner), new, old)
    parts = old.lerp_(new, step.index_select(0, owner)).split([buffer.numel() for buffer in olds])
    torch._foreach_copy_(
        olds, [part.view_as(buffer) for part, buffer in zip(parts, olds, strict=True)]
    )
    torch._foreach_copy_(counters, list((tracked + usable).unbind()))


@cache_constants
def _number_owners(sizes: tuple[int, ...], device: torch.device) -> Constants:
    """Return the index of the layer that owns each running statistic."""
    owners = torch.arange(len(sizes), dtype=torch.int32)
    return (owners.repeat_interleave(torch.tensor(sizes)).to(device),)
