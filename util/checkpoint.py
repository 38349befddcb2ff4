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
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

FORMAT_VERSION = 3
REQUIRED_KEYS = (
    "epoch",
    "step",
    "config",
    "spec",
    "progress",
    "meters",
    "model",
    "optimizer",
    "scheduler",
    "scaler",
    "rng",
    "history",
    "best_top1",
)
LATEST_NAME = "checkpoint.pth.tar"
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
    disk, a value that is not plain), a checkpoint that loads stays behind.

    Args:
        state: tensors and plain values with at least `REQUIRED_KEYS`; nested dicts, lists, tuples.

    Returns:
        The path written.

    Raises:
        CheckpointError: `state` lacks a key or holds something that would not load again.
    """
    path = Path(run_dir) / filename
    with atomic_write(path) as file:
        torch.save({**state, "format_version": FORMAT_VERSION}, file)
        file.flush()
        _read(Path(file.name), "meta", shown=path)  # "meta": everything but the tensors' memory
    if is_best:
        with atomic_write(path.with_name(BEST_NAME)) as best, open(path, "rb") as latest:
            shutil.copyfileobj(latest, best)
    return path


def load_checkpoint(path: str | Path, device: torch.device | str) -> dict[str, Any]:
    """Read a checkpoint with its tensors on `device`, never running code from the file.

    Raises:
        CheckpointError: missing, damaged, not written by `save_checkpoint`, or of another format.
    """
    return _read(Path(path), device, shown=Path(path))


def check_compatible(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Compare what a checkpoint was trained with to what this run asks for, key by key.

    Raises:
        CheckpointError: naming the first key that differs, its saved and its current value.
    """
    for key in {**current, **saved}:
        before, now = (repr(d[key]) if key in d else "absent" for d in (saved, current))
        if before != now:
            raise CheckpointError(
                f"cannot resume: {key} is {before} in the checkpoint, {now} in this run"
            )


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
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` only when the block ends well: the old one or the new.

    It is written beside `path` (a rename works within one file system only) and is on the disk,
    with its name, before the block is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path, device: torch.device | str, *, shown: Path) -> dict[str, Any]:
    """Read and check `path`; errors speak of `shown`."""
    try:
        _check_archive(path)
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{shown}: {error.strerror or error}") from error
    except Exception as error:  # a foreign file may upset the reader in any way at all
        raise CheckpointError(f"{shown}: {_explain(error)}") from error
    _check_keys(state, shown)
    return state


def _check_archive(path: Path) -> None:
    """Compare every checksum; torch.load would take altered numbers for good ones."""
    if path.stat().st_size == 0:
        raise zipfile.BadZipFile("the file is empty")
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"wrong checksum in {damaged}")


def _check_keys(state: Any, shown: Path) -> None:
    version = state.get("format_version") if isinstance(state, dict) else None
    if version == 2:  # which knew whole epochs only
        version = state["format_version"] = FORMAT_VERSION
        state["meters"] = None
    if version is None:
        raise CheckpointError(f"{shown}: not a checkpoint of this program (no format_version)")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{shown}: format_version is {version!r}, this program reads {FORMAT_VERSION}"
        )
    missing = [key for key in REQUIRED_KEYS if key not in state]
    if missing:
        raise CheckpointError(f"{shown}: the checkpoint lacks {', '.join(missing)}")


def _explain(error: Exception) -> str:
    """The reason in a few words; torch's own text recommends to load the file unsafely."""
    if isinstance(error, pickle.UnpicklingError):
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {asked[1]}, which" if asked else "it"
        return f"refused, {what} is more than tensors and plain values and may run code"
    text = textwrap.shorten(str(error), 120) or type(error).__name__
    return f"damaged, or not a checkpoint ({text})"
