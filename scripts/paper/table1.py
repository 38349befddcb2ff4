"""Reproduce Table 1 of the paper: ten networks after one epoch of CIFAR-10, VGG-11 after 20.

    python scripts/paper/table1.py --cifar10 DIR --dry-run
    python scripts/paper/table1.py --cifar10 DIR --jobs 2

Both kinds of layers train with `--preset paper`, deconvolution with the published root. VGG-16 and
ResNet-18 have three seeds, the other networks one. DenseNet-121 and DPN-92 train for half an epoch,
with the schedule fitted to it.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper.costs import estimate
from scripts.paper.records import Records
from scripts.paper.runner import FindTop1, Recipe, Run, count_steps, main
from scripts.paper.tables import KINDS, format_table, mean_top1, show_seconds, show_top1

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
GAPS = json.loads(Path(__file__).with_name("gaps.json").read_text())  # explanations, by network
NETWORKS = PUBLISHED["networks"]
SEEDS = {"vgg16": (0, 1, 2), "resnet18": (0, 1, 2)}
HALVED = ("densenet121", "dpn")
FLAGS = {"bn": "--deconv False", "deconv": "--deconv True --root newton"}
SOURCES = ("paper", "reproduced")
COLUMNS = [f"{kind}: {source}" for kind in KINDS.values() for source in (*SOURCES, "here")]
TIME_COLUMNS = [f"{kind}: training (s)" for kind in KINDS.values()]
BATCH_SIZE, LONG = 128, 20  # images per step; epochs of VGG-11
STEPS = count_steps("cifar10", BATCH_SIZE)
TOLERANCE = 2.0  # points of top-1; a wider gap to the paper needs an explanation


def plan(find_top1: FindTop1) -> list[Run]:
    runs = [
        make_run(arch, kind, seed, STEPS // 2 if arch in HALVED else STEPS)
        for arch, kind in product(NETWORKS, KINDS)
        for seed in SEEDS.get(arch, (0,))
    ]
    runs.sort(key=lambda run: run.seconds)
    return runs + [make_run("vgg11", kind, 0, LONG * STEPS) for kind in KINDS]


def make_run(
    arch: str, kind: str, seed: int, steps: int, extra: str = "", name: str | None = None
) -> Run:
    """Return a run with `--preset paper`; Best rates adds other flags and another name."""
    epochs = -(-steps // STEPS)
    flags = f"--preset paper --arch {arch} {FLAGS[kind]}{extra} --seed {seed} --epochs {epochs}"
    flags += f" --max-steps {steps}" if steps % STEPS else ""
    seconds = estimate(arch, kind == "deconv", steps, BATCH_SIZE, tests=epochs)
    return Run(name or name_run(arch, kind, seed), "cifar10", flags, steps, seconds)


def name_run(arch: str, kind: str, seed: int) -> str:
    return f"{arch}-{kind}-seed{seed}"


def name_runs(arch: str, kind: str) -> list[str]:
    return [name_run(arch, kind, seed) for seed in SEEDS.get(arch, (0,))]


def format_tables(records: Records) -> dict[str, str]:
    return {"epoch": _format_one_epoch(records), "long": _format_long(records)}


def _format_one_epoch(records: Records) -> str:
    header = ["network", "parameters (million)", *COLUMNS, *TIME_COLUMNS]
    header.append(f"gap to the paper above {TOLERANCE:g} points, and why")
    rows = []
    for arch, network in NETWORKS.items():
        title, millions = f"{network['title']} (`{arch}`)", f"{network['millions']:.2f}"
        names = [name_runs(arch, kind) for kind in KINDS]
        cells = _show_runs(network, "1", names, records, "½ " if arch in HALVED else "")
        rows.append([title, millions, *cells, explain_gap(arch, records)])
    return format_table(header, rows)


def _show_runs(
    network: dict[str, Any], epochs: str, names: list[list[str]], records: Records, mark: str = ""
) -> list[str | None]:
    """Return each kind's top-1 as published and here, then each kind's training time."""
    cells: list[str | None] = []
    for index, runs in enumerate(names):
        cells += [f"{network[s][epochs][index]:.2f}" if s in network else None for s in SOURCES]
        cells.append((mark if mean_top1(records, runs) else "") + show_top1(records, runs))
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


def _format_long(records: Records) -> str:
    header = ["network", *COLUMNS, *TIME_COLUMNS]
    networks = [NETWORKS["vgg16"], NETWORKS["resnet18"], {"title": "VGG-11"}]
    names = [[], []], [[], []], [[name_run("vgg11", kind, 0)] for kind in KINDS]
    rows = [
        [network["title"], *_show_runs(network, str(LONG), runs, records)]
        for network, runs in zip(networks, names, strict=True)
    ]
    return format_table(header, rows)


RECIPE = Recipe("table1", "Table 1 of the paper, after one epoch", plan, format_tables)

if __name__ == "__main__":
    main(RECIPE)
