"""What a person watching sees: lines and progress bars, from the first process of a run only."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from tqdm import tqdm

# Without tqdm's batches a second, so that the figures behind it fit into 80 columns.
BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"

_muted = False


def mute() -> None:
    """Show nothing from now on: called in all processes of a run but the first."""
    global _muted
    _muted = True


def visible(text: str) -> str:
    """The text as one line that commands no terminal: the name of a file may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_line(text: str) -> None:
    """A line on stdout, above the progress bar if there is one.

    Where a terminal has gone, nobody reads a pipe or a disk is full it is lost, and nothing else.
    """
    if not _muted:
        with suppress(OSError):
            tqdm.write(visible(text))


def open_streams() -> None:
    """Let what is said go nowhere where the process was started with stdout or stderr closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process


def flush_streams() -> None:
    """Drop what is still held and cannot be written: Python would exit with code 120 for it."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process


def speaks() -> bool:
    """Whether what this process says is shown."""
    return not _muted


def shows_bars() -> bool:
    """Whether there is a terminal for progress bars."""
    return sys.stderr.isatty()


def progress_bar(batches: Iterable | None, title: str, **more: Any) -> tqdm:
    """The batches again, with a bar and the time left; no bar where stderr is no terminal."""
    columns, lines = shutil.get_terminal_size((100, 24))  # tqdm draws none if it is unknown
    disable = True if _muted else None  # None: where stderr is no terminal
    shape = {"bar_format": BAR, "leave": False, "ncols": columns, "nrows": lines}
    return tqdm(batches, title, disable=disable, **shape, **more)
