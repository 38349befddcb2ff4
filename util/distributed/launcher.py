"""Several processes, one run: one process for each device, on one machine or many.

torchrun starts the processes and tells them who they are through environment variables;
`launch_workers` asks it to where the user has not. A run of one process is a `World` of size 1,
for which every operation here does nothing, so no caller asks whether there are others.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import distributed as dist

from util.distributed.world import World
from util.errors import PeerFailed, RunError

PATIENCE_HOURS = 2  # with a first process that downloads or reads images while the others wait
ARRIVAL_MINUTES = 5  # between the first process that is ready and the last
GRACE_SECONDS = 3.0  # in which the launcher ends all processes after one has failed


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


def wait_for_first_error() -> None:
    """Wait before speaking of an error: by then the launcher has ended this process if it can.

    What is wrong in one process is soon wrong in all, and one error is enough to read.
    """
    if is_launched():
        time.sleep(GRACE_SECONDS)


def launch_workers(script: str, argv: Sequence[str], *, processes: int, flags: Namespace) -> bool:
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
def init_processes(device: torch.device, backend: str | None = None) -> Iterator[World]:
    """The world that this process is part of, left again at the end.

    Args:
        device: of this process.
        backend: None: nccl for GPUs, else gloo.

    Raises:
        RunError: nccl without a GPU.
        PeerFailed: a process has failed before it came here.
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
    """Tell the processes that wait in `init_processes` that this one has failed.

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
        raise PeerFailed


def local_rank() -> int:
    """Number of this process on its machine; 0 for a process on its own."""
    return int(os.environ.get("LOCAL_RANK", 0))
