"""What a person watching sees: lines and progress bars, from the first process of a run only."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
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


def say(text: str) -> None:
    """A line on stdout, above the progress bar if there is one."""
    if not _muted:
        tqdm.write(visible(text))


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
