"""Compare finished runs: one figure of their curves and one Markdown table of their results.

    python scripts/compare.py runs/digits-vgg11-bn/* runs/digits-vgg11-deconv-mode5/*
    python scripts/compare.py RUN_DIR... --accuracy-only --out accuracy_against_steps
    python scripts/compare.py RUN_DIR... --tensorboard runs/comparison

The files are STEM.png and STEM.md, by default comparison.png and comparison.md in the current
folder. Runs that differ in the seed alone form a group. The figure shows a group's mean in a band
from the lowest to the highest seed. The table adds a row with mean and sample standard deviation.
Times are comparable between runs of one machine only.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.image import imread

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.cli.inherited import MAY_CHANGE
from util.cli.parser import Parser, report_errors
from util.console import visible
from util.files import atomic_write
from util.tracking.logger import BATCH_COLUMNS, EPOCH_COLUMNS, read_json, read_log
from util.tracking.plots import RunCurves, RunGroup, plot_comparison
from util.tracking.provenance import RECORD_NAME
from util.tracking.tensorboard import Events

FILES = ("summary.json", RECORD_NAME, "train.log", "test.log", "train_batch.log")
# Flags in which runs of one group may differ.
FREE_FLAGS = {"seed", *MAY_CHANGE} - {"data", "epochs", "max_steps"}
KIND_TITLES = {"bn": "BatchNorm", "plain": "no normalisation"}


@dataclass(frozen=True)
class Run:
    """Content of one run's folder."""

    name: str
    kind: str
    flags: dict[str, Any]
    summary: dict[str, Any]
    curves: RunCurves


def main(argv: Sequence[str] | None = None) -> None:
    """Write the figure and the table of the given runs, and print the table."""
    parser = build_parser()
    args = parser.parse_args(argv)
    stem = args.out.with_suffix("") if args.out.suffix in (".png", ".md") else args.out
    figure, text = (Path(f"{stem.absolute()}{suffix}") for suffix in (".png", ".md"))
    with report_errors(parser, ValueError):
        runs = list(map(read_run, args.runs, name_runs(args.runs)))
        groups = group_seeds(runs)
        table = format_table(groups)
        curves = [
            RunGroup(label, group[0].kind, [run.curves for run in group])
            for label, group in zip(label_groups(groups), groups, strict=True)
        ]
        title = describe_setting(runs) if args.title is None else args.title
        figure.parent.mkdir(parents=True, exist_ok=True)
        plot_comparison(curves, figure, title=title, accuracy_only=args.accuracy_only)
        with atomic_write(text) as file:
            file.write(table.encode())
        if args.tensorboard:
            write_events(args.tensorboard, figure, table)
    print(f"{table}\nwrote {visible(str(figure))} and {visible(text.name)}")


def build_parser() -> Parser:
    parser = Parser("compare.py", __doc__.splitlines()[0])
    text = "folder of a finished run, which holds summary.json"
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", type=Path, help=text)
    text = "write STEM.png and STEM.md (default: %(default)s, in the current folder)"
    parser.add_argument("--out", metavar="STEM", type=Path, default=Path("comparison"), help=text)
    text = "plot accuracy against steps alone (default: accuracy and loss, steps and seconds)"
    parser.add_argument("--accuracy-only", action="store_true", help=text)
    text = "title of the figure (default: network, dataset and batch size)"
    parser.add_argument("--title", metavar="TEXT", help=text)
    text = "also show figure and table in TensorBoard, as a run in the folder DIR"
    parser.add_argument("--tensorboard", metavar="DIR", type=Path, help=text)
    return parser


def write_events(folder: Path, figure: Path, table: str) -> None:
    """Write the figure and the table as TensorBoard events, in place of earlier ones."""
    pixels = torch.from_numpy(imread(figure))[..., :3]  # H W C
    events = Events(folder, purge_step=0)
    events.image("test/comparison", pixels.permute(2, 0, 1), 0)  # beside the curves of the runs
    events.text("comparison", table, 0)
    events.close()


def read_run(folder: Path, name: str) -> Run:
    """Read the files of a run; refuse a missing or damaged one by its name."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no folder of a finished run: {missing[0]} is missing")
    summary, record = read_json(folder / "summary.json"), read_json(folder / RECORD_NAME)
    train, test = (_read_log(folder / f"{part}.log", EPOCH_COLUMNS) for part in ("train", "test"))
    batches = _read_log(folder / "train_batch.log", BATCH_COLUMNS)
    path = folder / "val.log"
    val = _read_log(path, EPOCH_COLUMNS) if path.is_file() else None
    logs = {"train.log": train, "test.log": test} | ({"val.log": val} if val else {})
    if not train["epoch"] or any(log["epoch"] != train["epoch"] for log in logs.values()):
        raise ValueError(f"{folder}: {' and '.join(logs)} must have a row for each epoch")
    epoch_steps = summary.get("epoch_steps") or max(batches["batch"], default=1)
    total = summary.get("steps") or math.inf
    ends = [min(epoch * epoch_steps, total) for epoch in test["epoch"]]
    curves = RunCurves(train, test, batches, ends, epoch_steps, val)
    return Run(name, str(summary.get("kind", "run")), record.get("flags", {}), summary, curves)


def name_runs(folders: Sequence[Path]) -> list[str]:
    """Return each folder's path below the deepest common folder."""
    paths = [folder.resolve() for folder in folders]
    common = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(common).as_posix() for path in paths]


def group_seeds(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs that differ in the seed alone; a seed's second run begins another group."""
    groups: dict[tuple[str, int], list[Run]] = {}
    repeats: Counter[tuple[str, Any]] = Counter()
    for run in runs:
        fixed = {name: value for name, value in run.flags.items() if name not in FREE_FLAGS}
        # A flag may be recorded as an integer by default, and as a float where it was typed.
        fixed = {k: float(value) if type(value) is int else value for k, value in fixed.items()}
        setting = json.dumps([run.kind, fixed], sort_keys=True)
        seed = (setting, run.flags.get("seed"))
        groups.setdefault((setting, repeats[seed]), []).append(run)
        repeats[seed] += 1
    return list(groups.values())


def label_groups(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Label each group by kind and learning rate, and by name where these are not unique."""
    labels = []
    for group in groups:
        kind, rate = group[0].kind, group[0].summary.get("lr")
        label = KIND_TITLES.get(kind) or re.sub(r"^deconv-mode", "deconvolution mode ", kind)
        labels.append(f"{label}, lr {rate:g}" if isinstance(rate, (int, float)) else label)
    count = Counter(labels)
    for number, group in enumerate(groups):
        if count[labels[number]] > 1:
            labels[number] = f"{name_group(group)} ({labels[number]})"
        if len(group) > 1:
            labels[number] += f", {len(group)} seeds"
    return labels


def name_group(group: Sequence[Run]) -> str:
    """Return what the names of the runs begin with, without the word seed."""
    first = group[0].name
    if len(group) == 1:
        return first
    shared = os.path.commonprefix([run.name for run in group])  # noqa: RUF071 - by letters
    return re.sub(r"[-_./]*(seed)?[-_./]*$", "", shared) or first


def describe_setting(runs: Sequence[Run]) -> str:
    """Name network, dataset and batch size where all runs have them in common."""
    facts = []
    for name, form in (("arch", "{}"), ("dataset", "{}"), ("batch_size", "batch {}")):
        values = {run.summary.get(name) for run in runs}
        facts += [form.format(*values)] if len(values) == 1 and None not in values else []
    return ", ".join(facts)


def count_epochs(run: Run) -> int | str | None:
    """Return the finished epochs; "1 of 3" for a run that has not reached its end."""
    finished, epoch_steps = run.summary.get("epochs"), run.summary.get("epoch_steps")
    planned, max_steps = run.flags.get("epochs"), run.flags.get("max_steps")
    if epoch_steps and max_steps and planned:
        planned = min(planned, math.ceil(max_steps / epoch_steps))
    return f"{finished} of {planned}" if finished and planned and finished < planned else finished


COLUMNS: dict[str, Callable[[Run], Any]] = {
    "run": lambda run: run.name,
    "kind": lambda run: run.kind,
    "lr": lambda run: run.summary.get("lr"),
    "seed": lambda run: run.flags.get("seed"),
    "epochs": count_epochs,
    "steps": lambda run: run.summary.get("steps"),
}
METRICS = {  # key in summary.json, format
    "final top-1 (%)": ("test_top1", ".2f"),
    "final top-1 of the average (%)": ("test_ema_top1", ".2f"),
    "best top-1 (%)": ("best_test_top1", ".2f"),
    "test loss": ("test_loss", ".4f"),
    "training (s)": ("train_seconds", ".1f"),
    "images/s": ("images_per_second", ",.0f"),
    "parameters": ("parameters", ",.0f"),
    "peak memory (MB)": ("peak_memory_mb", ",.0f"),
}


def format_table(groups: Sequence[Sequence[Run]]) -> str:
    """Return a Markdown table: a row for each run, and one for the mean of several seeds."""
    runs = [run for group in groups for run in group]
    has_average = any("test_ema_top1" in run.summary for run in runs)
    metrics = {k: v for k, v in METRICS.items() if has_average or v[0] != "test_ema_top1"}
    titles = [*COLUMNS, *metrics]
    rows = [titles, [":---" if title in ("run", "kind") else "---:" for title in titles]]
    for group in groups:
        for run in group:
            rows.append(_format_row([run], {}, metrics.values()))
        if len(group) > 1:
            name, seeds = f"{name_group(group)} (mean ± std)", f"{len(group)} seeds"
            rows.append(_format_row(group, {"run": name, "seed": seeds}, metrics.values()))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _format_row(
    runs: Sequence[Run], known: dict[str, str], metrics: Iterable[tuple[str, str]]
) -> list[str]:
    """Format what the runs have in common, and mean and deviation of each metric."""
    cells = []
    for column, read in COLUMNS.items():
        values = {known[column]} if column in known else {read(run) for run in runs}
        cells.append(_escape(values.pop() if len(values) == 1 else None))
    for key, form in metrics:
        values = [run.summary.get(key) for run in runs]
        if not all(isinstance(value, (int, float)) for value in values):
            cells.append("-")  # missing, or not finite (null)
            continue
        spread = f" ± {stdev(values):{form}}" if len(set(values)) > 1 else ""
        cells.append(f"{mean(values):{form}}{spread}")
    return cells


def _escape(cell: Any) -> str:
    """Return one line of plain Markdown: a folder's name may hold bars, links and tags."""
    text = visible(" ".join(str("-" if cell is None else cell).split()))
    return re.sub(r"([\\|<\[`])", r"\\\1", text)


def _read_log(path: Path, columns: Sequence[str]) -> dict[str, list[float]]:
    log = read_log(path)
    if tuple(log)[: len(columns)] != tuple(columns):  # a moving average adds columns
        raise ValueError(f"{path}: the header must be {' '.join(columns)}, not {' '.join(log)}")
    return log


if __name__ == "__main__":
    main()
