"""Locks between processes, which the system frees when their owner ends, however it ends."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

HELD = {errno.EACCES, errno.EAGAIN}


class LockHeld(RuntimeError):
    """Another process has the lock; the message says which."""


def take_lock(path: Path, on_wait: Callable[[str], None] | None = None) -> IO[str]:
    """Own `path`, a file made for this, until what is returned is closed.

    The lock is one of POSIX: this process's alone, so that children which it forks, as loaders of
    images do, cannot keep it when it is killed; and known to other machines where the file system
    is. Where that knows no locks there is none. The file stays: were it removed, a process that
    waits for it and one that makes it anew could both own it. A link in its place is refused, as it
    would have its target emptied.

    Args:
        on_wait: told once who has the lock, before it is waited for; None: do not wait.

    Raises:
        LockHeld: another process has it.
        OSError: the file cannot be made.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    file = open(os.open(path, flags, 0o666), "a+", encoding="utf-8")  # noqa: SIM115 - held open
    try:
        if not _try(file, wait=False):
            file.seek(0)
            owner = file.read().strip() or "a process"
            if on_wait is None:
                raise LockHeld(owner)
            on_wait(owner)
            _try(file, wait=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


def _try(file: IO[str], *, wait: bool) -> bool:
    """Whether this process has the lock now; also where the file system knows none."""
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return error.errno not in HELD
    return True
