"""Format records as Markdown tables, with a dash for a missing value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from scripts.paper.records import Records, top1_of

DASH = "-"
KINDS = {"bn": "BatchNorm", "deconv": "deconvolution"}  # of layers, by their name in runs


def format_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; None becomes a dash."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[DASH if cell is None else str(cell) for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def mean_top1(records: Records, names: Sequence[str]) -> float | None:
    """Return the mean test top-1 in percent over the finished runs, None without one."""
    top1 = [value for name in names if (value := top1_of(records.get(name))) is not None]
    return mean(top1) if top1 else None


def show_top1(records: Records, names: Sequence[str]) -> str:
    """Return the mean test top-1 and each run's, or the step of divergence."""
    ran = [records[name] for name in names if name in records]
    shown = ", ".join(
        f"diverged at step {run['diverged']}" if "diverged" in run else f"{run['test_top1']:.2f}"
        for run in ran
    )
    average = mean_top1(records, names)
    if len(ran) > 1 and average is not None:
        return f"**{average:.2f}** ({shown})"
    return shown or DASH


def show_seconds(records: Records, names: Sequence[str]) -> str:
    """Return the mean training time in seconds over the finished runs."""
    times = [records.get(name, {}).get("train_seconds") for name in names]
    finished = [value for value in times if value is not None]
    return f"{mean(finished):,.0f}" if finished else DASH


def show_loss(loss: float | None, digits: int) -> str:
    """Return the loss with `digits` decimals, in scientific notation from 1e4 on."""
    if loss is None:
        return DASH
    return f"{loss:.{digits}f}" if abs(loss) < 1e4 else f"{loss:.1e}"
