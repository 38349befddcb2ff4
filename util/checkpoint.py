"""Checkpoints that survive a crash while writing, and that cannot run code while loading.

A checkpoint is a dict of tensors and plain values, so `weights_only=True` suffices to read it.
"""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from .content import check_content
from .rules import ContentError, describe

FORMAT_VERSION = 3
ABSENT = object()
LATEST_NAME = "checkpoint.pth.tar"
PREVIOUS_NAME = "checkpoint_previous.pth.tar"
BEST_NAME = "model_best.pth.tar"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or continued; the message names the file and why."""


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


def rng_state() -> dict[str, Any]:
    """The state of every random generator in use (torch, CUDA, numpy, python), as plain values."""
    # The global generator, for the sake of code of others that draws from it.
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    keys = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        # Asked only where CUDA is in use: asking would start it on every GPU.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": keys}},
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned; generators of GPUs that are not here are left out."""
    torch.set_rng_state(state["torch"].cpu())
    for index, cuda_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda_state.cpu(), index)
    saved = state["numpy"]
    keys = saved["state"]["key"].cpu().numpy().astype(np.uint32)
    np.random.set_state({**saved, "state": {**saved["state"], "key": keys}})  # noqa: NPY002
    random.setstate(state["python"])


@contextmanager
def atomic_write(path: str | Path, *, keep: str | None = None) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` only when the block ends well: the old one or the new.

    It is written beside `path` (a rename works within one file system only) and is on the disk,
    with its name, before the block is left.

    Args:
        keep: another name for the file that was at `path` before.

    Raises:
        OSError: it cannot be written; the error names `path` and the bytes that it had.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep:
            _rename_as_well(path, path.with_name(keep))
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is None:  # not of the file system
            raise
        written = temporary.stat().st_size if temporary.exists() else 0
        reason = f"{error.strerror} ({written:,} bytes were written)"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        with suppress(OSError):  # a read-only file system refuses even what is not there
            temporary.unlink()


def describe_fault(error: OSError) -> str:
    """An error of the file system in one line: the file, and what is wrong."""
    return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)


def clear_leftovers(folder: Path) -> None:
    """Remove what `atomic_write` left in the folder where a process was killed within it."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def _rename_as_well(path: Path, other: Path) -> None:
    """Give the file at `path`, if there is one, the name `other` too; no moment has neither."""
    if not path.exists():
        return
    second = other.with_name(f".{other.name}.{os.getpid()}.tmp")
    try:
        os.link(path, second)
        os.replace(second, other)
    except OSError:  # a file system that knows one name for a file
        os.replace(path, other)
    finally:
        with suppress(OSError):
            second.unlink()  # a rename does nothing where both are one file


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
