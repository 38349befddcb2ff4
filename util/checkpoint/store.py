"""Checkpoint files: written atomically, verified on reading, never executing code.

A checkpoint is a dict of tensors and plain values, so `torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import textwrap
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from util.checkpoint.schema import check_content
from util.errors import CheckpointError, ContentError, describe
from util.files import atomic_write

FORMAT_VERSION = 3
LATEST_NAME = "checkpoint.pth.tar"
PREVIOUS_NAME = "checkpoint_previous.pth.tar"
BEST_NAME = "model_best.pth.tar"
_ABSENT = object()


def save_checkpoint(
    state: dict[str, Any],
    run_dir: str | Path,
    *,
    filename: str = LATEST_NAME,
    is_best: bool = False,
) -> Path:
    """Write `state` and the format version to `run_dir/filename`.

    The new file is read back before it replaces the old one. Whatever fails (power, disk, a value
    that is not plain), a checkpoint that loads remains. The replaced latest checkpoint is kept as
    PREVIOUS_NAME.

    Args:
        state: tensors and plain values that match `schema.CONTENT`.
        run_dir: the folder of the run.
        filename: name of the file in `run_dir`.
        is_best: True copies the file to BEST_NAME.

    Raises:
        CheckpointError: `state` does not match the schema or would not load again.
        OSError: the file cannot be written; see `atomic_write`.
    """
    path = Path(run_dir) / filename
    state = {**state, "format_version": FORMAT_VERSION}
    _check_state(state, path)
    with atomic_write(path, keep=PREVIOUS_NAME if filename == LATEST_NAME else None) as file:
        _serialize(state, file)
        file.flush()
        _read(Path(file.name), "meta", name=path)  # "meta": no memory for tensors
    if is_best:
        with atomic_write(path.with_name(BEST_NAME)) as best, open(path, "rb") as latest:
            shutil.copyfileobj(latest, best)
    return path


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, never executing code of the file.

    Raises:
        CheckpointError: the file is missing, damaged, of another format, or its content does not
            match the schema.
    """
    state = _read(Path(path), "cpu", name=Path(path))
    _check_state(state, Path(path))
    return state


def load_foreign(path: str | Path) -> Any:
    """Read a file of `torch.save` to the CPU, never executing code of the file.

    The format of PyTorch before 1.6, which has no checksums, is read as well.

    Raises:
        CheckpointError: the file is missing or damaged, or has more than tensors and plain values.
    """
    return _read(Path(path), "cpu", name=Path(path), is_own=False)


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run: latest, previous, best, then the numbered ones.

    A dangling link, as to a disk that is not mounted, counts as a checkpoint that cannot be read.
    """
    run_dir = Path(run_dir)
    named = [run_dir / name for name in (LATEST_NAME, PREVIOUS_NAME, BEST_NAME)]
    numbered = sorted(set(run_dir.glob("checkpoint_*.pth.tar")) - set(named))
    return [path for path in (*named, *numbered) if os.path.lexists(path)]


def load_newest(
    run_dir: str | Path, load: Callable[[Path], dict[str, Any]]
) -> tuple[Path, dict[str, Any], list[str]]:
    """Load the readable checkpoint of a run with the most steps; `load` reads one checkpoint.

    Returns:
        Path and content of the checkpoint, and one message for each newer one that is damaged.

    Raises:
        CheckpointError: the folder holds no readable checkpoint, or permission to read one is
            denied. That one may be good and newer, and continuing from another would replace it.
    """
    loaded, errors = [], []
    for path in list_checkpoints(run_dir):
        try:
            loaded.append((path, load(path)))
        except CheckpointError as error:
            if isinstance(error.__cause__, PermissionError):
                remedy = "it may be the newest; make it readable, or --resume another file"
                raise CheckpointError(f"{error}: {remedy}") from error
            errors.append(str(error))
        if loaded and not errors and path.name != BEST_NAME:
            break  # no other checkpoint is newer than the latest
    if not loaded:
        raise CheckpointError("; ".join(errors) or f"{run_dir}: no checkpoint in this folder")
    return *max(loaded, key=lambda item: item[1]["step"]), errors


def select_weights(saved: dict[str, Any], use_ema: bool | None = None) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint to test or use.

    Args:
        saved: content of a checkpoint.
        use_ema: choose the moving average of --ema (True) or the trained weights (False). None: the
            average if there is one.

    Raises:
        CheckpointError: there is no average with `use_ema`.
    """
    has_average = saved["config"].get("ema") is not None
    if use_ema and not has_average:
        raise CheckpointError("--use-ema: the run had no --ema; leave this flag out")
    return saved["ema"]["model"] if has_average and use_ema is not False else saved["model"]


def check_compatible(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Check that the settings of a checkpoint equal those of the current run.

    Raises:
        CheckpointError: names the first setting that differs, with both values.
    """
    for key in {**current, **saved}:
        before, now = saved.get(key, _ABSENT), current.get(key, _ABSENT)
        if not _is_equal(before, now):
            name, before, now = _find_difference(key, before, now)
            raise CheckpointError(
                f"cannot resume: {name} is {before} in the checkpoint, {now} in this run"
            )


def _is_equal(before: Any, now: Any) -> bool:
    """Compare two values. A flag may be an integer by default, and a float where it was typed."""
    if type(before) in (int, float) and type(now) in (int, float) and before == now:
        return True
    return repr(before) == repr(now)


def _find_difference(name: str, before: Any, now: Any) -> tuple[str, str, str]:
    """Return the path of the first difference between two values, and both values in short."""
    if isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)):
        if len(before) != len(now):
            return f"the number of {name}", str(len(before)), str(len(now))
        for index, pair in enumerate(zip(before, now, strict=True)):
            if not _is_equal(*pair):
                return _find_difference(f"{name}[{index}]", *pair)
    return name, *(
        "absent" if v is _ABSENT else textwrap.shorten(repr(v), 80) for v in (before, now)
    )


def _serialize(state: dict[str, Any], file: BinaryIO) -> None:
    """Call torch.save, but raise the OSError behind its RuntimeError, as on a full disk."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _read(path: Path, device: str, *, name: Path, is_own: bool = True) -> Any:
    """Read the file at `path` and verify its checksums; errors call it `name`."""
    try:
        if is_own or zipfile.is_zipfile(path):
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that another program wrote
            return torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{name}: {error.strerror or error}") from error
    except Exception as error:  # a foreign file may raise anything in the reader
        raise CheckpointError(f"{name}: {_explain(error)}") from error


def _check_archive(path: Path) -> None:
    """Verify every checksum; torch.load would accept altered numbers."""
    if path.stat().st_size == 0:
        raise zipfile.BadZipFile("the file is empty")
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"wrong checksum in {damaged}")


def _check_state(state: Any, name: Path) -> None:
    """Check format version and content of the checkpoint `name`."""
    version = state.get("format_version") if type(state) is dict else None
    if version is None:
        raise CheckpointError(f"{name}: not a checkpoint of this program (no format_version)")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{name}: format_version is {describe(version)}, but this program reads version "
            f"{FORMAT_VERSION}; train again, or use the version of the program that wrote the file"
        )
    try:
        check_content(state)
    except ContentError as error:
        raise CheckpointError(f"{name}: damaged or foreign content: {error}") from error


def _explain(error: Exception) -> str:
    """Return the reason in a few words; PyTorch's own message advises to load unsafely."""
    if isinstance(error, pickle.UnpicklingError):
        name = re.search(r"GLOBAL (\S+)", str(error))
        subject = f"it asks for {name[1]}, which" if name else "it"
        return f"refused, {subject} is more than tensors and plain values and may run code"
    reason = textwrap.shorten(str(error), 120) or type(error).__name__
    return f"damaged, or not a checkpoint ({reason})"
