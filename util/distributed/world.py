"""World of a run: rank, world size, and the operations between processes."""

from __future__ import annotations

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
    """Processes of a run, as seen by one of them. With a size of 1, every operation is local.

    Attributes:
        rank: number of this process, from 0.
        size: world size, the number of processes.
        local_size: number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """True for rank 0, which writes files and prints."""
        return self.rank == 0

    def workers_per_process(self, count: int) -> int:
        """Divide `count` loader workers among the processes of this machine; round up."""
        return -(-count // self.local_size)

    def shard_count(self, count: int) -> int:
        """Return how many of `count` batches this process gets when batches are dealt in turn."""
        return len(range(self.rank, count, self.size))

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes, in every process."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def batch_offset(self, count: int) -> tuple[int, int]:
        """Return the number of images of lower ranks, and of all ranks, in a batch.

        `count` is the number of this process. The message is in host memory, since a message on a
        GPU would wait for all earlier work.
        """
        if self.size == 1:
            return 0, count
        counts = torch.zeros(self.size, dtype=torch.long)
        counts[self.rank] = count
        counts = self.sum(counts).tolist()
        return sum(counts[: self.rank]), sum(counts)

    def gather(self, value: T) -> list[T]:
        """Return the plain values or CPU tensors of all processes, by rank, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_rank0(self, action: Callable[[], T]) -> T:
        """Run action() on rank 0 alone; return its plain values in every process.

        If the action fails, the other processes raise PeerFailed.
        """
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]  # succeeded, result
        try:
            if self.is_first:
                outcome = [True, action()]
        finally:  # the others wait for the outcome, also of an error
            dist.broadcast_object_list(outcome, src=0)
        if not outcome[0]:
            raise PeerFailed
        return outcome[1]

    def rank0_first(self, action: Callable[[], T]) -> T:
        """Run action() on rank 0, then on all other ranks, which find the files of rank 0."""
        results: list[T] = []
        self.on_rank0(lambda: results.append(action()))
        return results[0] if results else action()

    def replicate(self, model: nn.Module) -> nn.Module:
        """Return the model wrapped to average gradients over the processes in every backward.

        Running statistics stay local to each process, see `average_buffers`.
        """
        if self.size == 1:
            return model
        names = signature(DistributedDataParallel).parameters  # the older name is deprecated
        each_forward = {"forward_sync_buffers", "broadcast_buffers"} & names.keys()
        return DistributedDataParallel(model, **{max(each_forward): False})

    def average_buffers(self, model: nn.Module) -> None:
        """Average the running statistics over the processes; counters stay unchanged."""
        for buffer in model.buffers() if self.size > 1 else ():
            if buffer.is_floating_point():
                buffer.copy_(self.sum(buffer) / self.size)

    def gather_own_buffers(self, model: nn.Module) -> list[dict[str, Tensor]]:
        """Return, by rank, the running statistics (on the CPU) that differ from rank 0."""
        if self.size == 1:
            return [{}]
        mine = {name: buffer.cpu() for name, buffer in model.named_buffers()}
        first = self.on_rank0(lambda: mine)
        return self.gather({n: b for n, b in mine.items() if not torch.equal(b, first[n])})

    def take_own_buffers(self, model: nn.Module, saved: Sequence[Mapping[str, Tensor]]) -> None:
        """Restore the statistics of `gather_own_buffers`; skip those of another world size."""
        buffers = dict(model.named_buffers())
        for name, values in saved[self.rank].items() if len(saved) == self.size else ():
            buffers[name].copy_(values)
