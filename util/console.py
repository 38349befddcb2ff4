"""Console output: lines and progress bars. Only rank 0 of a run prints."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from tqdm import tqdm

# The bar omits tqdm's batches per second, so that the metrics fit into 80 columns.
BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"

_muted = False


def mute() -> None:
    """Silence this process; every rank except 0 calls this function."""
    global _muted
    _muted = True


def visible(text: str) -> str:
    """Return the text as one printable line; escape control characters, e.g. of file names."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def join_names(names: Sequence[str], limit: int = 10) -> str:
    """Return names for a message, separated by commas; count those beyond the limit."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def print_line(text: str) -> None:
    """Print a line on stdout, above the progress bar; drop the line if stdout is unwritable."""
    if not _muted:
        with suppress(OSError):
            tqdm.write(visible(text))


def open_streams() -> None:
    """Replace closed standard streams by the null device."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            _drop_output(name)


def flush_streams() -> None:
    """Flush the standard streams; drop unwritable output, for which Python would exit with 120."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            _drop_output(name)


def _drop_output(name: str) -> None:
    setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process


def is_muted() -> bool:
    """Return True after `mute`."""
    return _muted


def shows_bars() -> bool:
    """Return True if stderr is a terminal."""
    return sys.stderr.isatty()


def progress_bar(batches: Iterable | None, title: str, **kwargs: Any) -> tqdm:
    """Wrap `batches` in a tqdm with the time left; None: a bar that the caller updates.

    Without a terminal no bar is shown.
    """
    columns, lines = shutil.get_terminal_size((100, 24))  # tqdm draws no bar of unknown size
    disable = True if _muted else None  # None: only without a terminal
    shape = {"bar_format": BAR, "leave": False, "ncols": columns, "nrows": lines}
    return tqdm(batches, title, disable=disable, **shape, **kwargs)
