"""A run and its surroundings: device, random numbers, folder, and the record of what made it."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from .checkpoint import (
    BEST_NAME,
    LATEST_NAME,
    PREVIOUS_NAME,
    CheckpointError,
    atomic_write,
    clear_leftovers,
    list_checkpoints,
    load_checkpoint,
    sync_folder,
)
from .lock import LockHeld, take_lock
from .logger import BATCH_LOG_NAME
from .signals import Stopped

RECORD_NAME = "args.json"
LOCK_NAME = ".lock"
PACKAGES = ("torchvision", "numpy", "scikit-learn", "pillow", "matplotlib", "tensorboardX")


class RunError(RuntimeError):
    """A run that cannot be started as asked."""


def count_processes(use_gpu: bool | None, gpu: int | None) -> int:
    """Processes for this machine: one for each visible GPU, one where none is to be used."""
    return 1 if use_gpu is False or gpu is not None else max(1, torch.cuda.device_count())


def choose_device(
    use_gpu: bool | None, gpu: int | None, threads: int | None, local_rank: int = 0
) -> torch.device:
    """The GPU of this process where there is one.

    Args:
        use_gpu: True insists on a GPU, False leaves them alone.
        gpu: the number of the one to use; None: that of the process.
        threads: how many PyTorch uses on the CPU, None as it chooses.
        local_rank: number of this process on its machine.

    Raises:
        RunError: True, and PyTorch sees no GPU; or there are fewer than processes.
    """
    visible = torch.cuda.device_count() if use_gpu is not False else 0
    if use_gpu and not visible:
        raise RunError("--use-gpu True: PyTorch sees no CUDA device here")
    if gpu is not None and gpu >= visible:
        raise RunError(f"--gpu {gpu}: PyTorch sees {visible} CUDA devices here")
    if threads is not None:
        torch.set_num_threads(threads)
    if gpu is not None and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise RunError(f"--gpu {gpu}: several processes on this machine cannot share one GPU")
    if not visible:
        return torch.device("cpu")
    index = local_rank if gpu is None else gpu
    if index >= visible:
        raise RunError(
            f"process {index} of this machine has no GPU: {visible} are visible; start as many "
            "processes, or use the CPU with --use-gpu False"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_graphs(
    wanted: bool | None, device: torch.device, processes: int, compiled: bool
) -> bool:
    """Whether training steps are replayed as CUDA graphs; unless told, wherever that can be.

    Raises:
        RunError: they are wanted where they cannot be.
    """
    possible = device.type == "cuda" and processes == 1
    if wanted and not possible:
        raise RunError(f"--cuda-graphs True: needs one GPU, here {processes} x {device.type}")
    if wanted and compiled:
        raise RunError("--cuda-graphs True: contradicts --compile")
    return possible and not compiled if wanted is None else wanted


def choose_algorithms(deterministic: bool) -> None:
    """Let PyTorch use only operations that give the same bits each time, or whichever is fastest.

    Called before a GPU is used: cuBLAS reads once how much memory it may have.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = False


def seed_everything(seed: int) -> None:
    """Seed every random generator in use, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - third parties draw from the global generator
    torch.manual_seed(seed)


def find_run_dir(run_dir: str | None, resume: str | None) -> Path | None:
    """The folder that the flags ask for; None where a new one is to be made.

    One that a run left before its first checkpoint may be used again.

    Raises:
        RunError: it holds another run, or is not a folder.
    """
    home = Path(resume).resolve().parent if resume else None
    if run_dir is None:
        return home
    path = Path(run_dir).expanduser()
    if path.exists() and not path.is_dir():
        raise RunError(f"--run-dir {run_dir}: not a folder")
    if list_checkpoints(path) and path.resolve() != home:
        raise RunError(f"--run-dir {run_dir}: holds a run already; continue it with --resume")
    return path


def open_run_dir(run_dir: Path | None, out: str, name: str) -> tuple[Path, IO[str]]:
    """Make `run_dir`, or a new folder out/name/<time> where that is None, for this process alone.

    What a killed process left in it is cleared.

    Returns:
        The folder, and a file to be closed when nothing more is written there.

    Raises:
        RunError: the system does not let it be made, or another process writes there.
    """
    try:
        if run_dir is None:
            run_dir = _make_new(Path(out).expanduser() / name)
        run_dir.mkdir(parents=True, exist_ok=True)
        sync_folder(run_dir.parent)
        lock = take_lock(run_dir / LOCK_NAME)
        clear_leftovers(run_dir)
    except OSError as error:
        name = error.filename or run_dir or out
        raise RunError(f"{name} cannot be made: {error.strerror}") from error
    except LockHeld as owner:
        raise RunError(f"{run_dir}: {owner} writes a run here; choose another folder") from owner
    return run_dir, lock


def _make_new(parent: Path) -> Path:
    """A folder named by the time that no other process has made."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in count():
        path = parent / (f"{stamp}-{number}" if number else stamp)
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("count() does not end")


def check_unchanged(run_dir: Path, resume: str | None, saved: Mapping[str, Any] | None) -> None:
    """See that no other process has trained in `run_dir` since this one looked, before it owned it.

    Raises:
        RunError: it has.
        CheckpointError: the checkpoint `resume`, with the content `saved`, is gone.
    """
    find_run_dir(str(run_dir), resume)
    if resume and saved and (now := load_checkpoint(resume, "cpu")["step"]) != saved["step"]:
        raise RunError(
            f"{resume}: another process has trained on, from step {saved['step']} to {now}; "
            "start again to go on from there"
        )


def check_last_batch(model: nn.Module, images: int, batch_size: int, processes: int = 1) -> None:
    """See that BatchNorm1d, which has no variance of one picture alone, never meets one.

    Raises:
        RunError: some process's share of the last batch of `images` pictures is a single one; or
            there are more processes than pictures in a batch.
    """
    if batch_size < processes:
        raise RunError(f"--batch-size {batch_size}: fewer pictures than the {processes} processes")
    last = images % batch_size or batch_size
    single = last // processes == 1 or -(-last // processes) == 1
    if single and any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
        among = f", shared by {processes} processes" if processes > 1 else ""
        raise RunError(
            f"--batch-size {batch_size}: the last batch of {images} pictures is of {last}{among}: "
            "one alone is too few for BatchNorm1d; choose another size or --batchnorm False"
        )


def carry_over(resume: str | None, saved: Mapping[str, Any] | None, run_dir: Path) -> None:
    """Bring checkpoint, best network and train_batch.log to the folder a run begins or goes on in.

    From then on it holds what is needed to go on, and nothing of another past: the checkpoint is
    its latest and only one. The best is the one that `saved`, the content of the checkpoint
    `resume`, knows: the checkpoint itself, or the one beside it if it is of that epoch, or of one
    before where the disk was full when that was to be kept.

    Raises:
        OSError: something cannot be read or written; what was there stays.
    """
    if resume is None or saved is None:
        (run_dir / BEST_NAME).unlink(missing_ok=True)
        return
    path, progress = Path(resume).resolve(), saved["progress"]
    beside = path.with_name(BEST_NAME)
    itself = progress["epoch"] == progress["best_epoch"] and saved["step"] == progress["step"]
    best = path if itself else beside if _is_best(beside, progress) else None
    _replace(run_dir / BEST_NAME, best)
    if path != (run_dir / LATEST_NAME).resolve():
        _replace(run_dir / LATEST_NAME, path)
        (run_dir / PREVIOUS_NAME).unlink(missing_ok=True)
    _replace(run_dir / BATCH_LOG_NAME, path.with_name(BATCH_LOG_NAME))


def write_record(
    run_dir: Path, flags: Mapping[str, Any], device: torch.device, processes: int = 1
) -> None:
    """Write RECORD_NAME: all one needs to know to do the run again."""
    record = {
        "flags": dict(flags),
        "versions": {"python": platform.python_version(), **_installed_versions()},
        "commit": _git_commit(),
        "device": describe_device(device),
        "processor": read_processor(),
        "processes": processes,
        "platform": platform.platform(),
    }
    with atomic_write(run_dir / RECORD_NAME) as file:
        file.write(json.dumps(record, indent=2).encode() + b"\n")


def describe_device(device: torch.device) -> str:
    """`cpu, 2 threads`, or `cuda, <name of the GPU>`."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"{device.type}, {torch.get_num_threads()} threads"


def read_processor() -> str:
    """The CPU's name where the system tells it, else its kind."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()


@contextmanager
def tell_where_to_continue(run_dir: Path | None, pictures: str = "") -> Iterator[None]:
    """Turn Ctrl-C and `Stopped` into one line that names the last checkpoint, and an exit code.

    Args:
        run_dir: None: say nothing.
        pictures: what names them on the command line, which --resume does not know.

    Raises:
        SystemExit: 130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP.
    """
    try:
        yield
    except (KeyboardInterrupt, Stopped) as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        if run_dir is not None:
            path = run_dir / LATEST_NAME
            again = " ".join(["--resume", shlex.quote(str(path)), *filter(None, [pictures])])
            hint = f"continue with {again}" if path.exists() else "nothing was saved yet"
            with suppress(OSError):  # the terminal may have gone
                print(f"\ninterrupted: {hint}", file=sys.stderr)
        sys.exit(128 + number)


def _is_best(path: Path, progress: Mapping[str, Any]) -> bool:
    """Whether `path` is the checkpoint that `progress` remembers as the best, or one before it."""
    try:
        state = load_checkpoint(path, "meta")
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError) and path.exists():
            raise error.__cause__ from None  # it may be good
        return False
    known = progress["best_epoch"], progress["best_top1"]
    return (state["epoch"], state["best_top1"]) == known or (
        state["epoch"] < known[0] and state["best_top1"] < known[1]
    )


def _replace(path: Path, source: Path | None) -> None:
    """Make `path` a copy of `source`, and remove it where there is none."""
    if source is None or not source.is_file():  # a pipe would be waited for
        path.unlink(missing_ok=True)
    elif path.resolve() != source:
        with atomic_write(path) as copy, open(source, "rb") as file:
            shutil.copyfileobj(file, copy)


def _installed_versions() -> dict[str, str]:
    versions = {"torch": torch.__version__}  # with the build, +cpu or +cu132
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _git_commit() -> str | None:
    """The commit of this checkout; None where the project is not the root of one."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    top, commit = answer.splitlines()
    return commit if Path(top).resolve() == root else None
