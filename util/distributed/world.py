"""TODO: util/distributed/world.py."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from util.errors import PeerFailed

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        local_size: how many of them are on this machine.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def share_workers(self, count: int) -> int:
        """Of `count` helpers on this machine, those of one process; rounded up."""
        return -(-count // self.local_size)

    def shard_count(self, count: int) -> int:
        """Of `count` batches dealt in turn, as those of a test are, how many this process gets."""
        return len(range(self.rank, count, self.size))

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, in every process; of any shape and device."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def batch_offset(self, count: int, device: torch.device) -> tuple[int, int]:
        """Of a batch of which this process has `count`: the number of its first, and all."""
        counts = torch.zeros(self.size, dtype=torch.long, device=device)
        counts[self.rank] = count
        counts = self.sum(counts).tolist()
        return sum(counts[: self.rank]), sum(counts)

    def gather(self, value: T) -> list[T]:
        """The plain values or CPU tensors of all processes, by rank, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_rank0(self, action: Callable[[], T]) -> T:
        """What action(), done by the first process alone, returns: plain values only.

        Raises:
            PeerFailed: in the other processes, where the action failed.
        """
        if self.size == 1:
            return action()
        answer: list[Any] = [None, None]  # succeeded, result
        try:
            if self.is_first:
                answer = [True, action()]
        finally:  # also while an error is on its way out
            dist.broadcast_object_list(answer, src=0)
        if not answer[0]:
            raise PeerFailed
        return answer[1]

    def rank0_first(self, action: Callable[[], T]) -> T:
        """action() in the first process, then, with what it has left behind, in all others."""
        results: list[T] = []
        self.on_rank0(lambda: results.append(action()))
        return results[0] if results else action()

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model with gradients that are averaged over the processes in every backward.

        Running statistics stay each process's own, see `average_buffers`.
        """
        if self.size == 1:
            return model
        names = signature(DistributedDataParallel).parameters  # the older name warns of its end
        each_forward = {"forward_sync_buffers", "broadcast_buffers"} & names.keys()
        return DistributedDataParallel(model, **{max(each_forward): False})

    def average_buffers(self, model: nn.Module) -> None:
        """Make the running statistics the mean over the processes, each of which saw a share.

        Counters are left alone. Statistics that were shared all along stay the same to rounding.
        """
        for buffer in model.buffers() if self.size > 1 else ():
            if buffer.is_floating_point():
                buffer.copy_(self.sum(buffer) / self.size)

    def gather_own_buffers(self, model: nn.Module) -> list[dict[str, Tensor]]:
        """By rank, the running statistics in which a process differs from the first, on the CPU.

        Within an epoch each has its own, but for those of whitening with shared statistics.
        """
        if self.size == 1:
            return [{}]
        mine = {name: buffer.cpu() for name, buffer in model.named_buffers()}
        marks = {name: _digest(buffer) for name, buffer in mine.items()}
        of_first = self.on_rank0(lambda: marks)
        return self.gather({n: b for n, b in mine.items() if marks[n] != of_first[n]})

    def take_own_buffers(self, model: nn.Module, saved: Sequence[Mapping[str, Tensor]]) -> None:
        """Put back what `gather_own_buffers` gave to as many processes."""
        buffers = dict(model.named_buffers())
        for name, values in saved[self.rank].items() if len(saved) == self.size else ():
            buffers[name].copy_(values)


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
