"""A run and its surroundings: device, random numbers, folder, and the record of what made it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

from util.checkpoint.store import (
    BEST_NAME,
    LATEST_NAME,
    PREVIOUS_NAME,
    list_checkpoints,
    load_checkpoint,
)
from util.errors import CheckpointError, RunError
from util.files import atomic_write, clear_leftovers, sync_folder
from util.lock import LockHeld, take_lock
from util.tracking.logger import BATCH_LOG_NAME

LOCK_NAME = ".lock"


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


def copy_previous_run(resume: str | None, saved: Mapping[str, Any] | None, run_dir: Path) -> None:
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
