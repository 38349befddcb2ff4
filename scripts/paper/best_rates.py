"""Train with BatchNorm and deconvolution, each at its own best learning rate and weight decay.

    python scripts/paper/best_rates.py --cifar10 DIR --jobs 2

VGG-16 and ResNet-18 on CIFAR-10. The search first tries the learning rates at the paper's weight
decay, and extends the range while the best rate is at its end. It then tries other weight decays at
the best rate, and repeats the best pair with more seeds. Every run trains for the whole epoch,
because a shorter training has another best rate.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper import table1
from scripts.paper.records import Records, look_up_top1
from scripts.paper.runner import FindTop1, Recipe, Run, main
from scripts.paper.tables import KINDS, format_table, mean_top1, show_top1

NETWORKS = {"vgg16": "VGG-16", "resnet18": "ResNet-18"}
SERIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # learning rates
RATES = {"bn": SERIES[1:5], "deconv": SERIES[3:6]}  # start of the search
DECAY, DECAYS = 1e-3, (5e-4, 2e-3)  # the paper's, and the others at the best rate
SEEDS = (0, 1, 2)

Pair = tuple[float, float]  # learning rate, weight decay


def plan(find_top1: FindTop1) -> list[Run]:
    runs = []
    for arch, kind in product(NETWORKS, KINDS):
        pairs, best = search(arch, kind, find_top1)
        runs += [make_run(arch, kind, pair, SEEDS[0]) for pair in pairs]
        if best is not None:
            runs += [make_run(arch, kind, best, seed) for seed in SEEDS[1:]]
    return runs


def search(arch: str, kind: str, find_top1: FindTop1) -> tuple[list[Pair], Pair | None]:
    """Return the pairs to try, as far as results determine them, and the best pair at the end."""

    def choose() -> Pair | None:
        top1 = {pair: find_top1(name_run(arch, kind, pair, SEEDS[0])) for pair in pairs}
        return None if None in top1.values() else max(top1, key=top1.__getitem__)

    pairs = [(rate, DECAY) for rate in RATES[kind]]
    # A top-1 of 0 means that every run diverged, or that a dry run only plans.
    while (best := choose()) and find_top1(name_run(arch, kind, best, SEEDS[0])):
        if (beyond := _find_beyond(best[0], [rate for rate, _ in pairs])) is None:
            break
        pairs.append((beyond, DECAY))
    if best is None:
        return pairs, None
    pairs += [(best[0], decay) for decay in DECAYS]
    return pairs, choose()


def _find_beyond(best: float, rates: Sequence[float]) -> float | None:
    """Return the next rate of the series if the best rate is the lowest or highest."""
    step = {min(rates): -1, max(rates): 1}.get(best, 0)
    index = SERIES.index(best) + step
    return SERIES[index] if step and 0 <= index < len(SERIES) else None


def make_run(arch: str, kind: str, pair: Pair, seed: int) -> Run:
    extra, name = f" --lr {pair[0]:g} --wd {pair[1]:g}", name_run(arch, kind, pair, seed)
    return table1.make_run(arch, kind, seed, table1.STEPS, name, extra=extra)


def name_run(arch: str, kind: str, pair: Pair, seed: int) -> str:
    return f"{arch}-{kind}-lr{pair[0]:g}-wd{pair[1]:g}-seed{seed}"


def find_best(arch: str, kind: str, records: Records) -> tuple[Pair | None, list[str]]:
    """Return the best pair of the records, None before the search has ended, and its runs."""
    _, pair = search(arch, kind, partial(look_up_top1, records))
    return pair, [name_run(arch, kind, pair, seed) for seed in SEEDS] if pair else []


def format_tables(records: Records) -> dict[str, str]:
    return {"search": _format_search(records), "best": _format_best(records)}


def _format_search(records: Records) -> str:
    find_top1 = partial(look_up_top1, records)
    tried = [search(arch, kind, find_top1)[0] for arch, kind in product(NETWORKS, KINDS)]
    rates = sorted({rate for pairs in tried for rate, _ in pairs})
    header = ["network", "layers", "weight decay", *(f"lr {rate:g}" for rate in rates)]
    rows = []
    for arch, kind, decay in product(NETWORKS, KINDS, sorted((DECAY, *DECAYS))):
        names = [name_run(arch, kind, (rate, decay), SEEDS[0]) for rate in rates]
        cells = [show_top1(records, [name]) for name in names]
        rows.append([NETWORKS[arch], KINDS[kind], f"{decay:g}", *cells])
    return format_table(header, rows)


def _format_best(records: Records) -> str:
    header = ["network", "layers", "lr", "weight decay", "test top-1 (%)"]
    rows = []
    for arch in NETWORKS:
        means = []
        for kind, title in KINDS.items():
            pair, names = find_best(arch, kind, records)
            means.append(mean_top1(records, names))
            values = [f"{value:g}" for value in pair] if pair else [None, None]
            rows.append([NETWORKS[arch], title, *values, show_top1(records, names)])
        difference = None if None in means else f"{means[1] - means[0]:+.2f}"
        rows.append([NETWORKS[arch], "deconvolution minus BatchNorm", None, None, difference])
    return format_table(header, rows)


RECIPE = Recipe("best_rates", "Best rates of each kind of layer", plan, format_tables)

if __name__ == "__main__":
    main(RECIPE)
