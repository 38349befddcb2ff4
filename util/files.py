"""Files that survive a crash: atomic writes and durable renames."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: str | Path, *, keep: str | None = None) -> Iterator[BinaryIO]:
    """Yield a temporary file, which replaces `path` on the disk when the block succeeds.

    Args:
        path: of the final file. A rename needs the temporary file in the same folder.
        keep: new name for the previous file at `path`. None drops the previous file.

    Raises:
        OSError: the file cannot be written. The error names `path` and the bytes written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep:
            _add_name(path, path.with_name(keep))
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is None:  # not of the file system
            raise
        written = temporary.stat().st_size if temporary.exists() else 0
        reason = f"{error.strerror} ({written:,} bytes were written)"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        with suppress(OSError):  # a read-only file system refuses to unlink a missing file, too
            temporary.unlink()


def describe_fault(error: OSError) -> str:
    """Return an error of the file system as one line: file and reason."""
    return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)


def clear_leftovers(folder: Path) -> None:
    """Remove temporary files of `atomic_write` whose process was killed."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def _add_name(path: Path, other: Path) -> None:
    """Give the file at `path`, if any, the second name `other`; one name exists at any moment."""
    if not path.exists():
        return
    temporary = other.with_name(f".{other.name}.{os.getpid()}.tmp")
    try:
        os.link(path, temporary)
        os.replace(temporary, other)
    except OSError:  # the file system has no hard links
        os.replace(path, other)
    finally:
        with suppress(OSError):
            temporary.unlink()  # a rename does nothing if both names are one file


def sync_folder(folder: Path) -> None:
    """Flush the renames in `folder` to the disk, on systems that can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
