"""Launch one process per device with torchrun, and join the processes to a world.

torchrun passes rank and world size through environment variables.
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

TIMEOUT_HOURS = 2  # of a message; other ranks wait while rank 0 downloads or reads images
ARRIVAL_MINUTES = 5  # between the first and the last process that is ready
GRACE_SECONDS = 3.0  # until the launcher has ended all processes after a failure


def is_launched() -> bool:
    """Return True if torchrun, or a launcher with its variables, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first_process() -> bool:
    """Return True if this process is, or will be, rank 0 of its run."""
    return not is_launched() or os.environ["RANK"] == "0"


def local_rank() -> int:
    """Return the number of this process on its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def check_agreement(world: World, step: int | None) -> None:
    """Raise RunError unless all processes continue from the same step; None is a fresh start."""
    steps = world.gather(step)
    if len(set(steps)) > 1:  # for example because each machine has its own disk
        found = ", ".join("none" if step is None else f"step {step}" for step in steps)
        raise RunError(f"--resume: the processes found different checkpoints ({found})")


def wait_for_first_error() -> None:
    """Wait before a second report of one failure, so that the launcher can end this process."""
    if is_launched():
        time.sleep(GRACE_SECONDS)


def launch_workers(script: str, argv: Sequence[str], *, processes: int, flags: Namespace) -> bool:
    """Run `script argv` with torchrun; return False if this process itself is the run.

    `processes` run on this machine. `flags` hold the number of machines `world_size` (None: 1), the
    number of this machine `rank` and the address `dist_url`.

    Raises:
        SystemExit: a process failed, with its exit code; a message if the process was killed.
    """
    machines = flags.world_size or 1
    if is_launched() or processes * machines == 1:
        return False
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # The failed process has reported the reason. The table of torchrun would hide the report.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    rendezvous = _address_flags(flags) if machines > 1 else ["--standalone"]
    words = [f"--nproc-per-node={processes}", f"--nnodes={machines}", *rendezvous, script, *argv]
    try:
        torchrun.run(torchrun.parse_args(words))
    except ChildFailedError as error:
        exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        sys.exit(_describe_exit(Path(script).name, exit_codes))
    except SignalException as error:
        sys.exit(128 + error.sigval)
    return True


def _describe_exit(name: str, exit_codes: Mapping[int, int]) -> int | str:
    """Return a message if a process was killed, else the exit code of the failed process."""
    for rank, code in exit_codes.items():
        if code < 0 and code != -signal.SIGTERM:  # with SIGTERM the launcher ends the others
            return f"{name}: error: process {rank} was ended by {signal.Signals(-code).name}"
    return max(1, *exit_codes.values())


def _address_flags(flags: Namespace) -> list[str]:
    """Return torchrun's flags for the number of this machine and the rendezvous address."""
    url = urlsplit(flags.dist_url)
    host, port = url.hostname, url.port
    if url.scheme == "env":
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    return [f"--node-rank={flags.rank or 0}", f"--master-addr={host}", f"--master-port={port}"]


@contextmanager
def init_processes(device: torch.device, backend: str | None = None) -> Iterator[World]:
    """Join the world of this process, of size 1 without a launcher; leave it after the block.

    `backend` is "nccl" or "gloo". None: nccl for GPUs, else gloo. Messages in host memory always
    use gloo.

    Raises:
        RunError: nccl without a GPU.
        PeerFailed: another process failed before it joined.
    """
    if not is_launched():
        yield World()
        return
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    if backend == "nccl" and device.type != "cuda":
        raise RunError("--dist-backend nccl: PyTorch sees no CUDA device here")
    store, rank, size = _open_store(60 * ARRIVAL_MINUTES)
    store.set(f"process {rank}", "here")
    keys = [f"process {number}" for number in range(size)]
    store.wait(keys)
    if any(store.get(key) == b"failed" for key in keys):
        raise PeerFailed
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if backend == "nccl" else backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(hours=TIMEOUT_HOURS),
        device_id=device if backend == "nccl" else None,
    )
    yield World(rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # After an error this line is skipped: NCCL would wait for messages of the other processes.
    dist.destroy_process_group()


@contextmanager
def announce_failure() -> Iterator[None]:
    """Report an error of this block to processes of other machines in `init_processes`."""
    try:
        yield
    except BaseException:
        if is_launched() and not dist.is_initialized():
            with suppress(Exception):
                store, rank, _ = _open_store(GRACE_SECONDS)
                store.set(f"process {rank}", "failed")
        raise


def _open_store(seconds: float) -> tuple[dist.Store, int, int]:
    """Return the run's key-value store (timeout in seconds), this rank and the world size."""
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # After a restart the launcher's store still holds the addresses of the dead processes.
        # Launchers of several machines count restarts separately and need a new store instead:
        # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, as in scripts/slurm.sh.
        attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        store = dist.PrefixStore(attempt, store)
    return store, rank, size
