"""Markdown tables of records; what has not been run is a dash."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from scripts.paper.records import Records, top1_of

DASH = "-"


def wrap(text: str) -> str:
    """A paragraph of lines of up to 100 columns."""
    return textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False) + "\n"


def format_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; None is a dash."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[DASH if cell is None else str(cell) for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def mean_top1(records: Records, names: Sequence[str]) -> float | None:
    """Over those of the runs that came to an end; None where none did."""
    found = [top1_of(records.get(name)) for name in names]
    found = [value for value in found if value is not None]
    return mean(found) if found else None


def show_top1(records: Records, names: Sequence[str]) -> str:
    """The mean, and where there are several the single ones; or at which step it diverged."""
    shown = [_show(records[name]) for name in names if name in records]
    if not shown:
        return DASH
    middle = mean_top1(records, names)
    if len(shown) == 1 or middle is None:
        return ", ".join(shown)
    return f"**{middle:.2f}** ({', '.join(shown)})"


def show_seconds(records: Records, names: Sequence[str]) -> str:
    """Seconds of training, the mean over runs."""
    found = [records[name].get("train_seconds") for name in names if name in records]
    found = [value for value in found if value is not None]
    return f"{mean(found):,.0f}" if found else DASH


def show_loss(loss: float | None, digits: int) -> str:
    """With so many digits after the point; of one that has left all bounds its magnitude."""
    if loss is None:
        return DASH
    return f"{loss:.{digits}f}" if abs(loss) < 1e4 else f"{loss:.1e}"


def _show(record: dict[str, Any]) -> str:
    if "diverged" in record:
        return f"diverged at step {record['diverged']}"
    return f"{record['test_top1']:.2f}"
