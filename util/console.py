"""What a person watching sees: lines and progress bars, from the first process of a run only."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_muted = False


def mute() -> None:
    """Show nothing from now on: called in all processes of a run but the first."""
    global _muted
    _muted = True


def say(text: str) -> None:
    """A line on stdout, above the progress bar if there is one."""
    if not _muted:
        tqdm.write(text)


def shows_bars() -> bool:
    """Whether there is a terminal for progress bars."""
    return sys.stderr.isatty()


def progress_bar(batches: Iterable, title: str, **more: Any) -> tqdm:
    """The batches again, with a bar and the time left; no bar where stderr is no terminal."""
    columns, lines = shutil.get_terminal_size((100, 24))  # tqdm draws none if it is unknown
    disable = True if _muted else None  # None: where stderr is no terminal
    return tqdm(batches, title, leave=False, ncols=columns, nrows=lines, disable=disable, **more)
