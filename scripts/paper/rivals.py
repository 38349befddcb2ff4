"""Compare deconvolution with rival layers and optimizers.

    python scripts/paper/rivals.py --cifar10 DIR --dry-run
    python scripts/paper/rivals.py --cifar10 DIR --only vgg11

Each arm, a kind of layers with an optimizer, trains VGG-11 and ResNet-18 for 150 steps of 128
images, and the network of airbench for 50 steps of 2,000 images with the recipe of airbench, all in
bfloat16. The search tries three learning rates, and extends the range while the best rate is at its
end. The best rate is repeated with two more seeds. A run is one of `rivals_train.py`.

After the last run, `rivals_steps.py` times the steps of all arms in turn and counts their FLOPs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper import rivals_train
from scripts.paper.best_rates import search_rates
from scripts.paper.costs import estimate
from scripts.paper.records import RESULTS, Records, load, look_up_top1, read_curve, read_or_exit
from scripts.paper.rivals_arms import (
    ARMS,
    NETWORKS,
    Case,
    Network,
    find_optimizer,
    make_flags,
    name_run,
)
from scripts.paper.runner import FindTop1, Program, Recipe, Run, main
from scripts.paper.tables import format_table, mean_top1, show_top1
from util.tracking.plots import RunCurves, RunGroup, plot_comparison

PROGRAM = Program("scripts/paper/rivals_train.py", rivals_train.build_script)
SEEDS = (0, 1, 2)
TIMES = "rivals_steps"  # written to results/ by rivals_steps.py
NO_RUNS = "No run is recorded yet.\n"


def plan(find_top1: FindTop1) -> list[Run]:
    runs = []
    for case in product(NETWORKS, ARMS):
        rates, best = search(case, find_top1)
        runs += [make_run(case, rate, SEEDS[0]) for rate in rates]
        if best is not None:
            runs += [make_run(case, best, seed) for seed in SEEDS[1:]]
    return runs


def search(case: Case, find_top1: FindTop1) -> tuple[list[float], float | None]:
    """Return the rates to try, as far as results determine them, and the best at the end."""
    series = NETWORKS[case[0]].rates[find_optimizer(case)]
    first = len(series) // 2 - 1
    find = lambda rate: find_top1(name_run(case, rate, SEEDS[0]))
    return search_rates(series[first : first + 3], series, find)


def make_run(case: Case, rate: float, seed: int) -> Run:
    network, arm = NETWORKS[case[0]], ARMS[case[1]]
    cost = estimate(
        f"{case[0]}, bfloat16",
        "True" in arm.flags,
        network.steps,
        network.batch_size,
        tests=network.epochs if case[0] != "airbench" else network.epochs + 6,
        slowdown=arm.slowdown[list(NETWORKS).index(case[0])],
    )
    name, flags = name_run(case, rate, seed), make_flags(case, rate, seed)
    return Run(name, "cifar10", flags, network.steps, program=PROGRAM, **cost)


def read_more(folder: Path) -> dict[str, Any]:
    """Return the curve of the training top-1, and the test top-1 on six views if measured."""
    views = folder / rivals_train.VIEWS_NAME
    found = read_or_exit(views) if views.exists() else {}
    return {"top1_curve": read_curve(folder, "top1"), **found}


def find_best(case: Case, records: Records) -> tuple[float | None, list[str]]:
    """Return the best rate of the records and its runs; the rate is None before the search ends."""
    _, best = search(case, partial(look_up_top1, records))
    return best, [] if best is None else [name_run(case, best, seed) for seed in SEEDS]


def load_times(results: Path = RESULTS) -> dict[Case, dict[str, Any]]:
    """Return the seconds and FLOPs of a step by case, as far as measured."""
    rows = load(TIMES, results).get("rows", ())
    return {(row["network"], row["arm"]): row for row in rows}


def format_tables(records: Records) -> dict[str, str]:
    values = {"accuracy": _format_accuracy(records), "rates": _format_rates(records)}
    measured = load(TIMES, RESULTS)
    return values | {
        "machine": ", ".join(measured.get("environment", {}).values()) or "not measured yet",
        "rounds": str(measured.get("rounds", "-")),
        "pictures": "\n\n".join(
            f"![{NETWORKS[name].title}]({_name_picture(Path('results_rivals.png'), name)})"
            for name, groups in _list_groups(records).items()
            if groups
        ),
    }


def _format_accuracy(records: Records) -> str:
    header = ["network", "layers", "optimizer", "best lr", "test top-1 (%)", "on six views (%)"]
    header += ["step (ms)", "ratio to BatchNorm with SGD", "training (s)", "training (PFLOP)"]
    rows, times = [], load_times()
    for case in product(NETWORKS, ARMS):
        best, names = find_best(case, records)
        if not any(name in records for name in names):
            continue
        network, time = NETWORKS[case[0]], times.get(case)
        cells = [f"{best:g}", show_top1(records, names), _show_views(records, names)]
        if time is None:
            cells += [None] * 4
        else:
            cells += [f"{1000 * time['seconds']:,.0f}", f"{time['ratio']:.2f}"]
            cells.append(f"{network.steps * time['seconds']:,.0f}")
            cells.append(f"{network.steps * time['flops'] / 1e15:.4f}")
        rows.append([network.title, ARMS[case[1]].layers, find_optimizer(case), *cells])
    return format_table(header, rows) if rows else NO_RUNS


def _show_views(records: Records, names: Sequence[str]) -> str | None:
    """Return the test top-1 on six views, as mean and by run; None if not measured."""
    runs = [records.get(name, {}) for name in names]
    seen = {name: {"test_top1": run["views_top1"]} for name, run in zip(names, runs, strict=True)
            if "views_top1" in run}  # fmt: skip
    return show_top1(seen, names) if mean_top1(seen, names) is not None else None


def _format_rates(records: Records) -> str:
    header = ["network", "layers", "optimizer", "test top-1 (%) by lr, seed 0"]
    rows = []
    for case in product(NETWORKS, ARMS):
        network, optimizer = NETWORKS[case[0]], find_optimizer(case)
        names = {rate: name_run(case, rate, SEEDS[0]) for rate in network.rates[optimizer]}
        tried = [
            f"{rate:g}: {show_top1(records, [name])}"
            for rate, name in names.items()
            if name in records
        ]
        if tried:
            rows.append([network.title, ARMS[case[1]].layers, optimizer, ", ".join(tried)])
    return format_table(header, rows) if rows else NO_RUNS


def draw(records: Records, path: Path) -> None:
    """Plot accuracy and loss against steps and seconds, one figure per network."""
    for name, groups in _list_groups(records).items():
        if groups:
            plot_comparison(groups, _name_picture(path, name), title=NETWORKS[name].title)


def _name_picture(path: Path, network: str) -> Path:
    return path.with_stem(f"{path.stem}_{network}")


def _list_groups(records: Records) -> dict[str, list[RunGroup]]:
    """Return the finished runs of each arm at its best rate, by network."""
    groups: dict[str, list[RunGroup]] = {name: [] for name in NETWORKS}
    times = load_times()
    for case in product(NETWORKS, ARMS):
        best, names = find_best(case, records)
        runs = [records[name] for name in names if name in records]
        curves = [
            _make_curves(run, times.get(case), NETWORKS[case[0]])
            for run in runs
            if "diverged" not in run and run["epochs"]
        ]
        if curves:
            arm = ARMS[case[1]]
            label = f"{arm.layers}, {find_optimizer(case)}, lr {best:g}"
            groups[case[0]].append(RunGroup(label, arm.kind, curves))
    return groups


def _make_curves(
    record: dict[str, Any], time: dict[str, Any] | None, network: Network
) -> RunCurves:
    """Return the curves of a run, in seconds of steps timed in turn if measured, else its own."""
    step = time["seconds"] if time else record["train_seconds"] / record["steps"]
    length = -(-network.steps // network.epochs)
    epochs = record["epochs"]
    ends = [min(length * int(row[0]), record["steps"]) for row in epochs]
    starts = [0, *ends[:-1]]
    columns = {"loss": 1, "top1": 2}
    train: dict[str, Any] = {name: [row[i] for row in epochs] for name, i in columns.items()}
    train["seconds"] = [step * (end - start) for start, end in zip(starts, ends, strict=True)]
    test = {name: [row[i + 2] for row in epochs] for name, i in columns.items()}
    steps = [number for number, _ in record["curve"]]
    batches = {
        "epoch": [(number - 1) // length + 1 for number in steps],
        "batch": [(number - 1) % length + 1 for number in steps],
        "seconds": [step * ((number - 1) % length + 1) for number in steps],
        "loss": [loss for _, loss in record["curve"]],
        "top1": [top1 for _, top1 in record["top1_curve"]],
    }
    return RunCurves(train, test, batches, ends, length)


def list_timing_commands(folder: Path, cifar10: str) -> list[list[str]]:
    """Return the command that times the steps of all arms."""
    return [[sys.executable, "scripts/paper/rivals_steps.py"]]


RECIPE = Recipe(
    "rivals",
    "Layers and optimizers that people use beside deconvolution",
    plan,
    format_tables,
    draw,
    follow_up=list_timing_commands,
    read_more=read_more,
)

if __name__ == "__main__":
    main(RECIPE)
