"""Train with BatchNorm and deconvolution, each at its own best learning rate and weight decay.

    python scripts/paper/best_rates.py --cifar10 DIR --jobs 2

VGG-16 and ResNet-18 on CIFAR-10. The search first tries the learning rates at the paper's weight
decay, and extends the range while the best rate is at its end. It then tries other weight decays at
the best rate, and repeats the best pair with more seeds. Every run trains for the whole epoch,
because a shorter training has another best rate.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeVar

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
Choice = TypeVar("Choice")


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

    def find_pair(pair: Pair) -> float | None:
        return find_top1(name_run(arch, kind, pair, SEEDS[0]))

    rates, best = search_rates(RATES[kind], SERIES, lambda rate: find_pair((rate, DECAY)))
    pairs = [(rate, DECAY) for rate in rates]
    if best is None:
        return pairs, None
    pairs += [(best, decay) for decay in DECAYS]
    return pairs, _choose({pair: find_pair(pair) for pair in pairs})


def search_rates(
    start: Sequence[float], series: Sequence[float], find: Callable[[float], float | None]
) -> tuple[list[float], float | None]:
    """Return the learning rates to try, as far as results determine them, and the best at the end.

    Args:
        start: rates to try first, neighbours in `series`.
        series: all rates, in order.
        find: find(rate) -> test top-1, None before the run has ended.
    """
    rates = list(start)
    # A top-1 of 0 means that every run diverged, or that a dry run only plans.
    while (best := _choose({rate: find(rate) for rate in rates})) and find(best):
        step = {min(rates): -1, max(rates): 1}.get(best, 0)
        index = series.index(best) + step
        if not (step and 0 <= index < len(series)):
            break
        rates.append(series[index])
    return rates, best


def _choose(top1: Mapping[Choice, float | None]) -> Choice | None:
    """Return the key of the highest top-1, None while one is missing."""
    known = {key: value for key, value in top1.items() if value is not None}
    return max(known, key=known.__getitem__) if len(known) == len(top1) else None


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
