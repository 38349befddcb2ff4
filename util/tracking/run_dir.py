"""The folder of a run: find, create and lock it, and copy a previous run into it."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from util.checkpoint.store import (
    BEST_NAME,
    LATEST_NAME,
    PREVIOUS_NAME,
    list_checkpoints,
    load_checkpoint,
)
from util.errors import MAX_COUNT, CheckpointError, RunError
from util.files import atomic_write, clear_leftovers, sync_folder
from util.lock import LockHeld, take_lock
from util.tracking.logger import BATCH_LOG_NAME

LOCK_NAME = ".lock"
STAMP = r"\d{8}-\d{6}(-\d+)?"  # name of a folder that `_create_stamped` makes


def find_run_dir(run_dir: str | None, resume: str | None, step: int = MAX_COUNT) -> Path | None:
    """Return the folder that the flags name; None if a new one is to be created.

    A folder whose run ended before its first checkpoint may be used again. `step` is the step of
    the checkpoint `resume`, which must not replace a later one.
    """
    home = Path(resume).resolve().parent if resume else None
    path = home if run_dir is None else Path(run_dir).expanduser()
    if path is None:
        return None
    if path.exists() and not path.is_dir():
        raise RunError(f"--run-dir {run_dir}: not a folder")
    if path.resolve() == home:
        _check_latest(home / LATEST_NAME, resume, step)
    elif list_checkpoints(path):
        raise RunError(f"--run-dir {run_dir}: already holds a run; continue it with --resume")
    return path


def _check_latest(latest: Path, resume: str | None, step: int) -> None:
    """Raise RunError if `latest`, which a run from `resume` would replace, has more steps."""
    if Path(str(resume)).resolve() == latest.resolve():
        return
    try:
        later = load_checkpoint(latest)["step"]
    except CheckpointError:  # missing or damaged: there is nothing to lose
        return
    if later > step:
        raise RunError(
            f"--resume {resume}: is of step {step} and would replace {latest} of step {later}; "
            f"continue from there with --resume {latest.parent}, or branch off with --run-dir NEW"
        )


def open_run_dir(run_dir: Path | None, out: str, name: str) -> tuple[Path, IO[str]]:
    """Create and lock `run_dir`, or a new folder out/name/<time> if `run_dir` is None.

    Temporary files of a killed process are removed.

    Returns:
        The folder, and the lock: a file to close when nothing more is written.
    """
    try:
        if run_dir is None:
            run_dir = _create_stamped(Path(out).expanduser() / name)
        run_dir.mkdir(parents=True, exist_ok=True)
        sync_folder(run_dir.parent)
        lock = take_lock(run_dir / LOCK_NAME)
        clear_leftovers(run_dir)
    except OSError as error:
        name = error.filename or run_dir or out
        raise RunError(f"{name} cannot be created: {error.strerror}") from error
    except LockHeld as owner:
        raise RunError(f"{run_dir}: {owner} writes a run here; choose another folder") from owner
    return run_dir, lock


def find_out(run_dir: Path) -> Path:
    """Return the --out of a run: the folder above name/<time>, or the parent of a --run-dir."""
    return run_dir.parent.parent if re.fullmatch(STAMP, run_dir.name) else run_dir.parent


def _create_stamped(parent: Path, suffix: int = 0) -> Path:
    """Create a folder named by the time, which no other process has created."""
    path = parent / (time.strftime("%Y%m%d-%H%M%S") + (f"-{suffix}" if suffix else ""))
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return _create_stamped(parent, suffix + 1)
    return path


def check_unchanged(run_dir: Path, resume: str | None, saved: Mapping[str, Any] | None) -> None:
    """Check that no other process trained in `run_dir` before this one locked it.

    `saved` is the content of the checkpoint `resume`, as read before the lock was taken.
    """
    find_run_dir(str(run_dir), resume)
    if resume and saved and (now := load_checkpoint(resume)["step"]) != saved["step"]:
        raise RunError(
            f"{resume}: another process has trained from step {saved['step']} to {now}; "
            "start again to continue from there"
        )


def copy_previous_run(resume: str | None, saved: Mapping[str, Any] | None, run_dir: Path) -> None:
    """Copy checkpoint, best model and train_batch.log of the resumed run into `run_dir`.

    The checkpoint becomes the latest and only one of the folder. The best model is the one that the
    checkpoint knows: the checkpoint itself, or the file beside it if that is of the best epoch. If
    a full disk kept the best epoch from being saved, an earlier best model is taken.

    Without `resume`, an old best model is removed. Existing files stay where one cannot be read.
    """
    if resume is None or saved is None:
        (run_dir / BEST_NAME).unlink(missing_ok=True)
        return
    path, progress = Path(resume).resolve(), saved["progress"]
    beside = path.with_name(BEST_NAME)
    itself = progress["epoch"] == progress["best_epoch"] and saved["step"] == progress["step"]
    # An epoch that --max-steps cut short was tested there, too. Older checkpoints lack the step.
    itself &= progress.get("best_step", progress["step"]) == progress["step"]
    best = path if itself else beside if _is_best(beside, progress) else None
    _replace(run_dir / BEST_NAME, best)
    if path != (run_dir / LATEST_NAME).resolve():
        _replace(run_dir / LATEST_NAME, path)
        (run_dir / PREVIOUS_NAME).unlink(missing_ok=True)
    _replace(run_dir / BATCH_LOG_NAME, path.with_name(BATCH_LOG_NAME))


def _is_best(path: Path, progress: Mapping[str, Any]) -> bool:
    """Return whether `path` holds the best epoch that `progress` names, or an earlier best."""
    try:
        state = load_checkpoint(path)
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError) and path.exists():
            raise error.__cause__ from None  # unreadable now, but perhaps intact
        return False
    known = progress["best_epoch"], progress["best_top1"]
    return (state["epoch"], state["best_top1"]) == known or (
        state["epoch"] < known[0] and state["best_top1"] < known[1]
    )


def _replace(path: Path, source: Path | None) -> None:
    """Make `path` a copy of `source`; remove `path` if there is no source."""
    if source is None or not source.is_file():  # a pipe would block
        path.unlink(missing_ok=True)
    elif path.resolve() != source:
        with atomic_write(path) as copy, open(source, "rb") as file:
            shutil.copyfileobj(file, copy)
