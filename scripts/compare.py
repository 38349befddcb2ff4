"""Compare finished runs: one picture of their curves and one Markdown table of their results.

    python scripts/compare.py runs/digits-vgg11-bn/* runs/digits-vgg11-deconv-mode5/*

Seconds are those of the machine that trained; compare them between runs of one machine only.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.console import visible
from util.files import atomic_write
from util.tracking.logger import BATCH_COLUMNS, EPOCH_COLUMNS, read_json, read_log
from util.tracking.plots import RunCurves, plot_comparison
from util.tracking.provenance import RECORD_NAME

FILES = ("summary.json", RECORD_NAME, "train.log", "test.log", "train_batch.log")


@dataclass(frozen=True)
class Run:
    """What one run folder tells."""

    name: str
    flags: dict[str, Any]
    summary: dict[str, Any]
    curves: RunCurves


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        runs = [
            read_run(folder, name)
            for folder, name in zip(args.runs, name_runs(args.runs), strict=True)
        ]
        table = format_table(runs)
        stem = args.out.with_suffix("") if args.out.suffix in (".png", ".md") else args.out
        picture, text = Path(f"{stem}.png"), Path(f"{stem}.md")
        picture.parent.mkdir(parents=True, exist_ok=True)
        plot_comparison([run.curves for run in runs], picture)
        with atomic_write(text) as file:
            file.write(table.encode())
    except (OSError, ValueError) as error:
        raise SystemExit(f"compare.py: {error}") from error
    print(f"{table}\ncurves: {picture}\ntable: {text}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs",
        metavar="RUN_DIR",
        nargs="+",
        type=Path,
        help="folder of a finished run, the one that holds summary.json",
    )
    parser.add_argument(
        "--out",
        metavar="STEM",
        type=Path,
        default=Path("comparison"),
        help="write STEM.png and STEM.md (default: %(default)s)",
    )
    return parser.parse_args(argv)


def read_run(folder: Path, name: str) -> Run:
    """Read the files of a run.

    Raises:
        ValueError: naming the folder and the file that is missing or damaged.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no folder of a finished run: {missing[0]} is missing")
    summary = read_json(folder / "summary.json")
    logs = (("train", EPOCH_COLUMNS), ("test", EPOCH_COLUMNS), ("train_batch", BATCH_COLUMNS))
    train, test, batches = (_read_log(folder / f"{stem}.log", columns) for stem, columns in logs)
    if len(train["epoch"]) != len(test["epoch"]):
        raise ValueError(f"{folder / 'test.log'}: not as many rows as train.log")
    kind = str(summary.get("kind", "run"))
    label = name if kind in name else f"{name} ({kind})"
    curves = RunCurves(label, kind, train, test, batches, summary.get("epoch_steps") or 0)
    return Run(name, read_json(folder / RECORD_NAME).get("flags", {}), summary, curves)


def count_epochs(run: Run) -> int | str | None:
    """The epochs finished, with "of" how many where the run has not come to its end."""
    done, epoch_steps = run.summary.get("epochs"), run.summary.get("epoch_steps")
    wanted, max_steps = run.flags.get("epochs"), run.flags.get("max_steps")
    if epoch_steps and max_steps and wanted:
        wanted = min(wanted, math.ceil(max_steps / epoch_steps))
    return f"{done} of {wanted}" if done and wanted and done < wanted else done


def name_runs(folders: Sequence[Path]) -> list[str]:
    """Each folder's path below the deepest folder that they share."""
    paths = [folder.resolve() for folder in folders]
    shared = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(shared).as_posix() for path in paths]


COLUMNS: dict[str, Callable[[Run], Any]] = {
    "run": lambda run: run.name,
    "kind": lambda run: run.curves.kind,
    "seed": lambda run: run.flags.get("seed"),
    "epochs": count_epochs,
    "steps": lambda run: run.summary.get("steps"),
    "best top-1 (%)": lambda run: _number(run.summary.get("best_test_top1"), ".2f"),
    "final top-1 (%)": lambda run: _number(run.summary.get("test_top1"), ".2f"),
    "test loss": lambda run: _number(run.summary.get("test_loss"), ".4f"),
    "training (s)": lambda run: _number(run.summary.get("train_seconds"), ".1f"),
    "pictures/s": lambda run: _number(run.summary.get("images_per_second"), ",.0f"),
    "parameters": lambda run: _number(run.summary.get("parameters"), ",.0f"),
    "peak memory (MB)": lambda run: _number(run.summary.get("peak_memory_mb"), ",.0f"),
}


def format_table(runs: Sequence[Run]) -> str:
    """The runs as a Markdown table, one row each, numbers to the right."""
    cells = [[_escape(column(run)) for column in COLUMNS.values()] for run in runs]
    rule = [":---" if title in ("run", "kind") else "---:" for title in COLUMNS]
    return "".join(f"| {' | '.join(row)} |\n" for row in [list(COLUMNS), rule, *cells])


def _number(value: Any, form: str) -> str:
    """`value` in `form`; "-" where the run did not say, or where it was not finite (null)."""
    return format(value, form) if isinstance(value, (int, float)) else "-"


def _escape(cell: Any) -> str:
    """One line in which nothing ends the cell, or is a link or a tag; a folder may be so called."""
    text = visible(" ".join(str("-" if cell is None else cell).split()))
    return re.sub(r"([\\|<\[`])", r"\\\1", text)


def _read_log(path: Path, columns: Sequence[str]) -> dict[str, list[float]]:
    log = read_log(path)
    if tuple(log) != tuple(columns):
        raise ValueError(f"{path}: the header must be {' '.join(columns)}, not {' '.join(log)}")
    return log


if __name__ == "__main__":
    main()
