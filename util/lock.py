"""Locks between processes, released by the system when their owner ends."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows takes no locks
    fcntl = None

HELD = {errno.EACCES, errno.EAGAIN}


class LockHeld(RuntimeError):
    """Lock that another process holds; the message names the process."""


def take_lock(path: Path, on_wait: Callable[[str], None] | None = None) -> IO[str]:
    """Lock the file `path`; closing the returned file releases the lock.

    A POSIX lock belongs to this process alone, not to its forked children. Other machines see the
    lock if the file system supports it. A system without locks gets the open file alone.

    Args:
        path: of the lock file, made if missing. The file stays, because two processes could lock a
            removed file and its successor. A symbolic link is refused: its target would be emptied.
        on_wait: called once with the name of the owner before waiting. None: do not wait.

    Raises:
        LockHeld: another process holds the lock, and `on_wait` is None.
        OSError: the file cannot be made.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    file = open(os.open(path, flags, 0o666), "a+", encoding="utf-8")  # noqa: SIM115 - held open
    try:
        if not _try_lock(file, wait=False):
            file.seek(0)
            owner = file.read().strip() or "a process"
            if on_wait is None:
                raise LockHeld(owner)
            on_wait(owner)
            _try_lock(file, wait=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


def _try_lock(file: IO[str], *, wait: bool) -> bool:
    """Return True if this process holds the lock, or the file system has no locks."""
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return error.errno not in HELD
    return True
