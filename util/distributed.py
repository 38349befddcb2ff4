"""Several processes, one run: one process for each device, on one machine or many.

torchrun starts the processes and tells them who they are through environment variables; `spread`
asks it to where the user has not. A run of one process is a `World` of size 1, for which every
operation here does nothing, so no caller asks whether there are others.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .run import RunError

PATIENCE_HOURS = 2  # with a first process that downloads or reads pictures while the others wait
ARRIVAL_MINUTES = 5  # between the first process that is ready and the last
GRACE_SECONDS = 3.0  # in which the launcher ends all processes after one has failed

T = TypeVar("T")


class Elsewhere(RuntimeError):
    """Another process has failed, and told why."""


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

    def deal(self, count: int) -> int:
        """Of `count` batches dealt in turn, as those of a test are, how many this process gets."""
        return len(range(self.rank, count, self.size))

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, in every process; of any shape and device."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def locate(self, count: int, device: torch.device) -> tuple[int, int]:
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

    def first(self, action: Callable[[], T]) -> T:
        """What action(), done by the first process alone, returns: plain values only.

        Raises:
            Elsewhere: in the other processes, where the action failed.
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
            raise Elsewhere
        return answer[1]

    def first_then_all(self, action: Callable[[], T]) -> T:
        """action() in the first process, then, with what it has left behind, in all others."""
        results: list[T] = []
        self.first(lambda: results.append(action()))
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
        of_first = self.first(lambda: marks)
        return self.gather({n: b for n, b in mine.items() if marks[n] != of_first[n]})

    def take_own_buffers(self, model: nn.Module, saved: Sequence[Mapping[str, Tensor]]) -> None:
        """Put back what `gather_own_buffers` gave to as many processes."""
        buffers = dict(model.named_buffers())
        for name, values in saved[self.rank].items() if len(saved) == self.size else ():
            buffers[name].copy_(values)


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def is_launched() -> bool:
    """Whether torchrun, or another launcher that speaks its language, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def speaks() -> bool:
    """Whether this process is, or will be, the first of its run."""
    return not is_launched() or os.environ["RANK"] == "0"


def check_agreement(world: World, step: int | None) -> None:
    """See that all processes continue from the same step, None being a fresh start.

    Raises:
        RunError: they do not, as where each machine has a disk of its own.
    """
    steps = world.gather(step)
    if len(set(steps)) > 1:
        told = ", ".join("none" if step is None else f"step {step}" for step in steps)
        raise RunError(f"--resume: the processes found different checkpoints ({told})")


def let_the_guilty_speak() -> None:
    """Wait before speaking of an error: by then the launcher has ended this process if it can.

    What is wrong in one process is soon wrong in all, and one error is enough to read.
    """
    if is_launched():
        time.sleep(GRACE_SECONDS)


def spread(script: str, argv: Sequence[str], *, processes: int, flags: Namespace) -> bool:
    """Run `script argv` once for each device through torchrun; False if this process is enough.

    Args:
        processes: for this machine.
        flags: `world_size` machines (None: one), this one of number `rank`, meeting at `dist_url`.

    Raises:
        SystemExit: with the exit code of the process that failed, once all have ended; with a line
            where it was killed, as for want of memory.
    """
    machines = flags.world_size or 1
    if is_launched() or processes * machines == 1:
        return False
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # The process that failed has said why; torchrun would bury it under a table.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    meeting = _meeting_point(flags) if machines > 1 else ["--standalone"]
    words = [f"--nproc-per-node={processes}", f"--nnodes={machines}", *meeting, script, *argv]
    try:
        torchrun.run(torchrun.parse_args(words))
    except ChildFailedError as error:
        ends = {rank: failure.exitcode for rank, failure in error.failures.items()}
        sys.exit(_tell_end(Path(script).name, ends))
    except SignalException as error:
        sys.exit(128 + error.sigval)
    return True


def _tell_end(name: str, ends: Mapping[int, int]) -> int | str:
    """What to exit with: a line where a process was ended from outside, and so could not say why.

    Else the code of the process that failed.

    Args:
        ends: exit codes by process; the launcher has ended those with SIGTERM's.
    """
    killed = [rank for rank, code in ends.items() if code < 0 and code != -signal.SIGTERM]
    if not killed:
        return max(1, *ends.values())
    end = signal.Signals(-ends[killed[0]]).name
    return f"{name}: error: process {killed[0]} was ended by {end}"


def _meeting_point(flags: Namespace) -> list[str]:
    url = urlsplit(flags.dist_url)
    host, port = url.hostname, url.port
    if url.scheme == "env":
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    return [f"--node-rank={flags.rank or 0}", f"--master-addr={host}", f"--master-port={port}"]


@contextmanager
def join(device: torch.device, backend: str | None = None) -> Iterator[World]:
    """The world that this process is part of, left again at the end.

    Args:
        device: of this process.
        backend: None: nccl for GPUs, else gloo.

    Raises:
        RunError: nccl without a GPU.
        Elsewhere: a process has failed before it came here.
    """
    if not is_launched():
        yield World()
        return
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    if backend == "nccl" and device.type != "cuda":
        raise RunError("--dist-backend nccl: PyTorch sees no CUDA device here")
    store, rank, size = _meet(60 * ARRIVAL_MINUTES)
    _await_all(store, rank, size)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(hours=PATIENCE_HOURS),
        device_id=device if backend == "nccl" else None,
    )
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    yield World(rank, size, local_size)
    # Not after an error: the others may be in the middle of a message, and NCCL would wait.
    dist.destroy_process_group()


@contextmanager
def tell_if_it_fails() -> Iterator[None]:
    """Tell the processes that wait in `join` for this one when an error keeps it from coming.

    The launcher ends those of the same machine, but not those of others.
    """
    try:
        yield
    except BaseException:
        if is_launched() and not dist.is_initialized():
            with suppress(Exception):
                store, rank, _ = _meet(GRACE_SECONDS)
                store.set(f"process {rank}", "failed")
        raise


def _meet(seconds: float) -> tuple[dist.Store, int, int]:
    """The store that all processes of the run know, the number of this one, how many they are.

    Args:
        seconds: to wait for others, now and whenever the store is asked for what it has not yet.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # After a restart the launcher's store still knows the addresses of the processes that died.
        # Launchers of several machines count their restarts apart, and need a new store instead:
        # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, as in scripts/slurm.sh.
        attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        store = dist.PrefixStore(attempt, store)
    return store, rank, size


def _await_all(store: dist.Store, rank: int, size: int) -> None:
    """Wait until every process has come, or has told that it will not."""
    store.set(f"process {rank}", "here")
    keys = [f"process {number}" for number in range(size)]
    store.wait(keys)
    if any(store.get(key) == b"failed" for key in keys):
        raise Elsewhere


def local_rank() -> int:
    """Number of this process on its machine; 0 for a process on its own."""
    return int(os.environ.get("LOCAL_RANK", 0))
