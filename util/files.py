"""TODO: util/files.py."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


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
