"""Reproduce Table 1 of the paper: ten networks on CIFAR-10 and CIFAR-100, and VGG-11.

    python scripts/paper/table1.py --cifar10 DIR --half-epochs densenet121 dpn --jobs 2
    python scripts/paper/table1.py --dataset cifar100 --epochs 1 20 100 --gpus 0-7 --dry-run

Both kinds of layers train with `--preset paper`, deconvolution with the published root. For one
epoch of CIFAR-10, VGG-16 and ResNet-18 have three seeds. All other runs have one.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper.costs import estimate
from scripts.paper.records import Records
from scripts.paper.runner import AddFlag, FindTop1, Plan, Recipe, Run, count_steps, main
from scripts.paper.tables import KINDS, format_table, mean_top1, show_seconds, show_top1
from util.cli.parser import bounded_int

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
GAPS = json.loads(Path(__file__).with_name("gaps.json").read_text())  # explanations, by network
NETWORKS = PUBLISHED["networks"]
SEEDS = {"vgg16": (0, 1, 2), "resnet18": (0, 1, 2)}
HALVED = ("densenet121", "dpn")  # shorter runs of one epoch that the report accepts
DATASETS, EPOCHS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}, (1, 20, 100)
UNPUBLISHED = "vgg11"  # trained for 20 epochs of CIFAR-10, without a published value
FLAGS = {"bn": "--deconv False", "deconv": "--deconv True --root newton"}
SOURCES = ("paper", "reproduced")
COLUMNS = [f"{kind}: {source}" for kind in KINDS.values() for source in (*SOURCES, "here")]
TIME_COLUMNS = [f"{kind}: training (s)" for kind in KINDS.values()]
BATCH_SIZE = 128
STEPS = count_steps("cifar10", BATCH_SIZE)
TOLERANCE = 2.0  # points of top-1; a wider gap to the paper needs an explanation


def plan(find_top1: FindTop1) -> list[Run]:
    """Return all runs that the report shows."""
    return list_runs(list(DATASETS), EPOCHS, HALVED)


def list_runs(datasets: Sequence[str], lengths: Sequence[int], halved: Sequence[str]) -> list[Run]:
    """Return the runs of these datasets and numbers of epochs, short runs first."""
    runs = []
    for dataset, epochs, kind in product(datasets, lengths, KINDS):
        networks = [*NETWORKS, UNPUBLISHED] if (dataset, epochs) == ("cifar10", 20) else NETWORKS
        for arch in networks:
            steps = STEPS // 2 if epochs == 1 and arch in halved else epochs * STEPS
            names = name_runs(arch, kind, epochs, dataset)
            runs += [
                make_run(arch, kind, seed, steps, name, dataset) for seed, name in enumerate(names)
            ]
    return sorted(runs, key=lambda run: run.seconds)


def make_run(
    arch: str,
    kind: str,
    seed: int,
    steps: int,
    name: str,
    dataset: str = "cifar10",
    extra: str = "",
) -> Run:
    """Return a run with `--preset paper` and the `extra` flags."""
    epochs = -(-steps // STEPS)
    flags = f"--preset paper --arch {arch} {FLAGS[kind]}{extra} --seed {seed} --epochs {epochs}"
    flags += f" --max-steps {steps}" if steps % STEPS else ""
    times = estimate(arch, kind == "deconv", steps, BATCH_SIZE, tests=epochs)
    return Run(name, dataset, flags, steps, **times)


def name_runs(arch: str, kind: str, epochs: int = 1, dataset: str = "cifar10") -> list[str]:
    """Return the name of the run of each seed."""
    length = "" if epochs == 1 or arch == UNPUBLISHED else f"-epochs{epochs}"
    prefix = "" if dataset == "cifar10" else f"{dataset}-"
    seeds = SEEDS.get(arch, (0,)) if (epochs, dataset) == (1, "cifar10") else (0,)
    return [f"{prefix}{arch}-{kind}{length}-seed{seed}" for seed in seeds]


def add_flags(add: AddFlag) -> None:
    several: dict[str, Any] = {"nargs": "+", "metavar": "N"}
    add("--dataset", "dataset of the runs", None, "cifar10", choices=tuple(DATASETS))
    text = "numbers of epochs; the schedule is fitted to each"
    add("--epochs", text, bounded_int(1), [1], "1", choices=EPOCHS, **several)
    text = "networks that train for half an epoch where --epochs is 1"
    several["metavar"] = "NAME"
    add("--half-epochs", text, None, [], "none", choices=tuple(NETWORKS), **several)


def choose(flags: Namespace) -> Plan:
    """Return the plan of the typed flags."""
    runs = list_runs([flags.dataset], flags.epochs, flags.half_epochs)
    return lambda find_top1: runs


def format_tables(records: Records) -> dict[str, str]:
    return {"epoch": _format_one_epoch(records), "long": _format_others(records)}


def _format_one_epoch(records: Records) -> str:
    header = ["network", "parameters (million)", *COLUMNS, *TIME_COLUMNS]
    header.append(f"gap to the paper above {TOLERANCE:g} points, and why")
    rows = []
    for arch, network in NETWORKS.items():
        title, millions = f"{network['title']} (`{arch}`)", f"{network['millions']:.2f}"
        cells = _show_runs(arch, 1, "cifar10", records)
        rows.append([title, millions, *cells, explain_gap(arch, records)])
    return format_table(header, rows)


def _show_runs(arch: str, epochs: int, dataset: str, records: Records) -> list[str | None]:
    """Return each kind's top-1 as published and here, then each kind's training time."""
    network, names = NETWORKS.get(arch, {}), [name_runs(arch, k, epochs, dataset) for k in KINDS]
    columns = {"cifar10": SOURCES, "cifar100": ("cifar100", "-")}[dataset]
    cells: list[str | None] = []
    for index, runs in enumerate(names):
        published = [network.get(column, {}).get(str(epochs)) for column in columns]
        cells += [pair and f"{pair[index]:.2f}" for pair in published]
        half = any(records.get(name, {}).get("steps", STEPS) < STEPS for name in runs)
        cells.append(("½ " if half else "") + show_top1(records, runs))
    return cells + [show_seconds(records, runs) for runs in names]


def explain_gap(arch: str, records: Records) -> str | None:
    """Return the wide gaps between our means and the paper's, with the explanation, if any."""
    gaps = []
    for index, (kind, title) in enumerate(KINDS.items()):
        ours = mean_top1(records, name_runs(arch, kind))
        gap = 0.0 if ours is None else ours - NETWORKS[arch]["paper"]["1"][index]
        if abs(gap) > TOLERANCE:
            gaps.append(f"{title} {gap:+.1f}")
    return f"{', '.join(gaps)}: {GAPS.get(arch, 'not explained yet')}" if gaps else None


def _format_others(records: Records) -> str:
    """Return the other columns of the table: recorded runs, VGG-16 and ResNet-18."""
    header = ["dataset", "epochs", "network", *COLUMNS, *TIME_COLUMNS]
    titles = {arch: network["title"] for arch, network in NETWORKS.items()}
    rows = []
    for (dataset, label), epochs in product(DATASETS.items(), EPOCHS):
        if (dataset, epochs) == ("cifar10", 1):
            continue
        for arch, title in {**titles, UNPUBLISHED: "VGG-11"}.items():
            names = [name for kind in KINDS for name in name_runs(arch, kind, epochs, dataset)]
            own = arch != UNPUBLISHED or (dataset, epochs) == ("cifar10", 20)
            if own and (arch in SEEDS or not records.keys().isdisjoint(names)):
                rows.append([label, epochs, title, *_show_runs(arch, epochs, dataset, records)])
    return format_table(header, rows)


RECIPE = Recipe(
    "table1", "Table 1 of the paper", plan, format_tables, add_flags=add_flags, choose=choose
)

if __name__ == "__main__":
    main(RECIPE)
