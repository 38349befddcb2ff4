"""Checkpoints that survive a crash while writing, and that cannot run code while loading.

A checkpoint is a dict of tensors and plain values, so `weights_only=True` suffices to read it.
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
from util.checkpoint.validators import describe
from util.errors import CheckpointError, ContentError
from util.files import atomic_write

FORMAT_VERSION = 3
ABSENT = object()
LATEST_NAME = "checkpoint.pth.tar"
PREVIOUS_NAME = "checkpoint_previous.pth.tar"
BEST_NAME = "model_best.pth.tar"


def save_checkpoint(
    state: dict[str, Any],
    run_dir: str | Path,
    *,
    filename: str = LATEST_NAME,
    is_best: bool = False,
) -> Path:
    """Write `state` and its format version to `run_dir/filename`; copy it to the best if `is_best`.

    The new file is read back before it takes the old one's place, so whatever goes wrong (power,
    disk, a value that is not plain), a checkpoint that loads stays behind. The latest but one stays
    as well, as PREVIOUS_NAME.

    Args:
        state: what `content.CONTENT` tells: tensors and plain values in dicts, lists and tuples.

    Returns:
        The path written.

    Raises:
        CheckpointError: `state` lacks something or holds something that would not load again.
        OSError: it cannot be written; see `atomic_write`.
    """
    path = Path(run_dir) / filename
    with atomic_write(path, keep=PREVIOUS_NAME if filename == LATEST_NAME else None) as file:
        _serialise({**state, "format_version": FORMAT_VERSION}, file)
        file.flush()
        _read(Path(file.name), "meta", shown=path)  # "meta": everything but the tensors' memory
    if is_best:
        with atomic_write(path.with_name(BEST_NAME)) as best, open(path, "rb") as latest:
            shutil.copyfileobj(latest, best)
    return path


def load_checkpoint(path: str | Path, device: torch.device | str) -> dict[str, Any]:
    """Read a checkpoint with its tensors on `device`, never running code from the file.

    Raises:
        CheckpointError: missing, damaged, of another format, or with content that no run has.
    """
    return _read(Path(path), device, shown=Path(path))


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """The checkpoints in the folder of a run: the latest, the one before, the best, then others.

    A link that leads nowhere, as to a disk that is not there now, is one that cannot be read.
    """
    run_dir = Path(run_dir)
    usual = [run_dir / name for name in (LATEST_NAME, PREVIOUS_NAME, BEST_NAME)]
    numbered = sorted(set(run_dir.glob("checkpoint_*.pth.tar")) - set(usual))
    return [path for path in (*usual, *numbered) if os.path.lexists(path)]


def load_newest(
    run_dir: str | Path, load: Callable[[Path], dict[str, Any]]
) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint of a run's folder that can be read and had come farthest.

    Args:
        load: reads one, its tensors to the CPU.

    Returns:
        Its path, its content with tensors on the CPU, and what is wrong with those that cannot be
        read and may be newer.

    Raises:
        CheckpointError: the folder has none, or all are damaged; or one must not be read: it is
            no worse for that, and going on from another would replace it.
    """
    found, faults = [], []
    for path in list_checkpoints(run_dir):
        try:
            found.append((path, load(path)))
        except CheckpointError as error:
            if isinstance(error.__cause__, PermissionError):
                text = "it may be good and newer than others; let it be read, or --resume another"
                raise CheckpointError(f"{error}: {text}") from error
            faults.append(str(error))
        if found and not faults and path.name != BEST_NAME:
            break  # no other can be ahead of the latest
    if not found:
        raise CheckpointError("; ".join(faults) or f"{run_dir}: no checkpoint in this folder")
    return *max(found, key=lambda one: one[1]["step"]), faults


def check_compatible(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Compare what a checkpoint was trained with to what this run asks for, key by key.

    Raises:
        CheckpointError: naming the first key that differs, its saved and its current value.
    """
    for key in {**current, **saved}:
        if repr(saved.get(key, ABSENT)) != repr(current.get(key, ABSENT)):
            name, before, now = _first_difference(
                key, saved.get(key, ABSENT), current.get(key, ABSENT)
            )
            raise CheckpointError(
                f"cannot resume: {name} is {before} in the checkpoint, {now} in this run"
            )


def _first_difference(name: str, before: Any, now: Any) -> tuple[str, str, str]:
    """What differs between two values, down to the item of a list; name and both, in short."""
    if isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)):
        if len(before) != len(now):
            return f"the number of {name}", str(len(before)), str(len(now))
        for index, items in enumerate(zip(before, now, strict=True)):
            if repr(items[0]) != repr(items[1]):
                return _first_difference(f"{name}[{index}]", *items)
    return name, *("absent" if v is ABSENT else _shorten(v) for v in (before, now))


def _shorten(value: Any) -> str:
    return textwrap.shorten(repr(value), 80)


def _serialise(state: dict[str, Any], file: BinaryIO) -> None:
    """torch.save, whose errors about a full disk would speak of positions."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _read(path: Path, device: torch.device | str, *, shown: Path) -> dict[str, Any]:
    """Read and check `path`; errors speak of `shown`."""
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kinds of files that are not ours
            state = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{shown}: {error.strerror or error}") from error
    except Exception as error:  # a foreign file may upset the reader in any way at all
        raise CheckpointError(f"{shown}: {_explain(error)}") from error
    _check_format(state, shown, has_values=str(device) != "meta")
    return state


def _check_archive(path: Path) -> None:
    """Compare every checksum; torch.load would take altered numbers for good ones."""
    if path.stat().st_size == 0:
        raise zipfile.BadZipFile("the file is empty")
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"wrong checksum in {damaged}")


def _check_format(state: Any, shown: Path, *, has_values: bool) -> None:
    version = state.get("format_version") if type(state) is dict else None
    if version == 2:  # which knew whole epochs only
        version = state["format_version"] = FORMAT_VERSION
        state["meters"] = None
    if version is None:
        raise CheckpointError(f"{shown}: not a checkpoint of this program (no format_version)")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{shown}: format_version is {describe(version)}, this program reads {FORMAT_VERSION}"
        )
    try:
        check_content(state, has_values=has_values)
    except ContentError as error:
        raise CheckpointError(f"{shown}: damaged or foreign content: {error}") from error


def _explain(error: Exception) -> str:
    """The reason in a few words; torch's own text recommends to load the file unsafely."""
    if isinstance(error, pickle.UnpicklingError):
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {asked[1]}, which" if asked else "it"
        return f"refused, {what} is more than tensors and plain values and may run code"
    text = textwrap.shorten(str(error), 120) or type(error).__name__
    return f"damaged, or not a checkpoint ({text})"
