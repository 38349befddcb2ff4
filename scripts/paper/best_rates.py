"""BatchNorm at its own best rate and weight decay, against deconvolution at its own.

    python scripts/paper/best_rates.py --cifar10 DIR --jobs 2

VGG-16 and ResNet-18 on CIFAR-10. Every pair of the grid is trained for the whole epoch with one
seed, for the best pair of shorter trainings is another one; the best of each kind then with more.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper.costs import estimate
from scripts.paper.engine import Find, Recipe, Run, count_steps, main
from scripts.paper.records import Records
from scripts.paper.table1 import FLAGS
from scripts.paper.tables import format_table, mean_top1, show_seconds, show_top1, wrap

NETWORKS = {"vgg16": "VGG-16", "resnet18": "ResNet-18"}
KINDS = {"bn": "BatchNorm", "deconv": "deconvolution"}
RATES = {"bn": (0.003, 0.01, 0.03, 0.1), "deconv": (0.03, 0.1, 0.3)}
DECAYS = (5e-4, 1e-3, 2e-3)
SEEDS = (0, 1, 2)
BATCH = 128
STEPS = count_steps("cifar10", BATCH)

Pair = tuple[float, float]  # learning rate, weight decay


def plan(find: Find) -> list[Run]:
    runs = []
    for arch, kind in product(NETWORKS, KINDS):
        runs += [make_run(arch, kind, pair, SEEDS[0]) for pair in list_pairs(kind)]
        if (best := choose(arch, kind, find)) is not None:
            runs += [make_run(arch, kind, best, seed) for seed in SEEDS[1:]]
    return runs


def list_pairs(kind: str) -> list[Pair]:
    return list(product(RATES[kind], DECAYS))


def choose(arch: str, kind: str, find: Find) -> Pair | None:
    """The pair with the best top-1; None as long as not all of them are found."""
    found = {pair: find(name_run(arch, kind, pair, SEEDS[0])) for pair in list_pairs(kind)}
    return None if None in found.values() else max(found, key=found.__getitem__)


def make_run(arch: str, kind: str, pair: Pair, seed: int) -> Run:
    lr, decay = pair
    flags = f"--preset paper --arch {arch} {FLAGS[kind]}"
    flags += f" --lr {lr:g} --wd {decay:g} --epochs 1 --seed {seed}"
    seconds = estimate(arch, kind == "deconv", STEPS, BATCH)
    return Run(name_run(arch, kind, pair, seed), "cifar10", flags, STEPS, seconds)


def name_run(arch: str, kind: str, pair: Pair, seed: int) -> str:
    return f"{arch}-{kind}-lr{pair[0]:g}-wd{pair[1]:g}-seed{seed}"


def page(records: Records) -> str:
    text = f"""
        CIFAR-10, test top-1 in percent after one epoch, `--preset paper --root newton` but for
        learning rate and weight decay. Seconds compare where a machine did nothing
        else. First all pairs of a small grid, seed {SEEDS[0]}:
        """
    return f"""\
{wrap(text)}
{_describe_grid(records)}
Then the best pair of each kind, with the seeds {", ".join(map(str, SEEDS))}:

{_describe_best(records)}"""


def _describe_grid(records: Records) -> str:
    rates = sorted({rate for kind in KINDS for rate in RATES[kind]})
    header = ["network", "layers", "weight decay", *(f"lr {rate:g}" for rate in rates)]
    rows = []
    for arch, kind, decay in product(NETWORKS, KINDS, DECAYS):
        names = [name_run(arch, kind, (rate, decay), SEEDS[0]) for rate in rates]
        cells = [show_top1(records, [name]) for name in names]
        rows.append([NETWORKS[arch], KINDS[kind], f"{decay:g}", *cells])
    return format_table(header, rows)


def _describe_best(records: Records) -> str:
    header = ["network", "layers", "lr", "weight decay", "test top-1", "seconds of training"]
    rows = []
    for arch in NETWORKS:
        best = {kind: _list_best(arch, kind, records) for kind in KINDS}
        for kind, (pair, names) in best.items():
            shown = [f"{value:g}" for value in pair] if pair else [None, None]
            cells = [show_top1(records, names), show_seconds(records, names)]
            rows.append([NETWORKS[arch], KINDS[kind], *shown, *cells])
        bn, deconv = (mean_top1(records, names) for _, names in best.values())
        more = None if bn is None or deconv is None else f"{deconv - bn:+.2f}"
        rows.append([NETWORKS[arch], "deconvolution above BatchNorm", None, None, more, None])
    return format_table(header, rows)


def _list_best(arch: str, kind: str, records: Records) -> tuple[Pair | None, list[str]]:
    """The best pair, and the names of its runs; none as long as the grid is not complete."""

    def find(name: str) -> float | None:
        return (mean_top1(records, [name]) or 0.0) if name in records else None

    best = choose(arch, kind, find)
    return best, [name_run(arch, kind, best, seed) for seed in SEEDS] if best else []


RECIPE = Recipe("best_rates", "Best rates: each kind at its own", plan, page)

if __name__ == "__main__":
    main(RECIPE)
