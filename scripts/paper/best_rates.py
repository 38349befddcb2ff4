"""BatchNorm at its own best rate and weight decay, against deconvolution at its own.

    python scripts/paper/best_rates.py --cifar10 DIR --jobs 2

VGG-16 and ResNet-18 on CIFAR-10. Every pair of the grid is trained for 100 steps with one seed, to
which the schedule is fitted; the best pair of each kind then for the whole epoch with three seeds.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper.costs import estimate
from scripts.paper.engine import Find, Recipe, Run, count_steps, main
from scripts.paper.records import Records
from scripts.paper.tables import format_table, mean_top1, show_seconds, show_top1

NETWORKS = {"vgg16": "VGG-16", "resnet18": "ResNet-18"}
KINDS = {"bn": "BatchNorm", "deconv": "deconvolution"}
RATES = {"bn": (0.003, 0.01, 0.03, 0.1), "deconv": (0.03, 0.1, 0.3)}
DECAYS = (5e-4, 1e-3, 2e-3)
SEEDS = (0, 1, 2)
BATCH, SCREEN = 128, 100  # pictures of a step; steps of the runs that compare pairs
STEPS = count_steps("cifar10", BATCH)

Pair = tuple[float, float]  # learning rate, weight decay


def plan(find: Find) -> list[Run]:
    runs = []
    for arch, kind in product(NETWORKS, KINDS):
        pairs = list_pairs(kind)
        runs += [make_run(arch, kind, pair, 0, SCREEN) for pair in pairs]
        found = {pair: find(name_screen(arch, kind, pair)) for pair in pairs}
        if None not in found.values():
            best = max(pairs, key=lambda pair, found=found: found[pair])
            runs += [make_run(arch, kind, best, seed, STEPS) for seed in SEEDS]
    return runs


def list_pairs(kind: str) -> list[Pair]:
    return list(product(RATES[kind], DECAYS))


def make_run(arch: str, kind: str, pair: Pair, seed: int, steps: int) -> Run:
    lr, decay = pair
    flags = f"--preset paper --arch {arch} --deconv {kind == 'deconv'} --lr {lr:g} --wd {decay:g}"
    flags += f" --epochs 1 --max-steps {steps} --seed {seed}"
    seconds = estimate(arch, kind == "deconv", steps, BATCH)
    screens = steps == SCREEN
    name = name_screen(arch, kind, pair) if screens else name_best(arch, kind, seed)
    return Run(name, "cifar10", flags, steps, seconds)


def name_screen(arch: str, kind: str, pair: Pair) -> str:
    return f"{arch}-{kind}-lr{pair[0]:g}-wd{pair[1]:g}"


def name_best(arch: str, kind: str, seed: int) -> str:
    return f"{arch}-{kind}-best-seed{seed}"


def page(records: Records) -> str:
    return f"""\
CIFAR-10, test top-1 in percent, `--preset paper` but for learning rate and weight decay. First all
pairs of a small grid after {SCREEN} steps, one seed:

{_describe_grid(records)}
Then the best pair of each kind for one epoch, three seeds:

{_describe_best(records)}"""


def _describe_grid(records: Records) -> str:
    rates = sorted({rate for kind in KINDS for rate in RATES[kind]})
    header = ["network", "layers", "weight decay", *(f"lr {rate:g}" for rate in rates)]
    rows = []
    for arch, kind, decay in product(NETWORKS, KINDS, DECAYS):
        names = [name_screen(arch, kind, (rate, decay)) for rate in rates]
        cells = [show_top1(records, [name]) for name in names]
        rows.append([NETWORKS[arch], KINDS[kind], f"{decay:g}", *cells])
    return format_table(header, rows)


def _describe_best(records: Records) -> str:
    header = ["network", "layers", "lr", "weight decay", "test top-1", "seconds of training"]
    rows = []
    for arch in NETWORKS:
        for kind in KINDS:
            names = [name_best(arch, kind, seed) for seed in SEEDS]
            made = next((records[name]["flags"] for name in names if name in records), None)
            pair = [f"{made[key]:g}" for key in ("lr", "weight_decay")] if made else [None, None]
            cells = [show_top1(records, names), show_seconds(records, names)]
            rows.append([NETWORKS[arch], KINDS[kind], *pair, *cells])
        rows.append([NETWORKS[arch], "deconvolution above BatchNorm", *[None] * 2,
                     _compare(arch, records), None])  # fmt: skip
    return format_table(header, rows)


def _compare(arch: str, records: Records) -> str | None:
    bn, deconv = (
        mean_top1(records, [name_best(arch, kind, seed) for seed in SEEDS]) for kind in KINDS
    )
    return None if bn is None or deconv is None else f"{deconv - bn:+.2f}"


RECIPE = Recipe("best_rates", "Best rates: each kind at its own", plan, page)

if __name__ == "__main__":
    main(RECIPE)
