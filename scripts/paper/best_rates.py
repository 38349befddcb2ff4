"""BatchNorm at its own best rate and weight decay, against deconvolution at its own.

    python scripts/paper/best_rates.py --cifar10 DIR --jobs 2

VGG-16 and ResNet-18 on CIFAR-10. First all rates at the paper's weight decay, and the next one
where the best is at an end of them, then the best at other decays, then that pair with more seeds.
Every training has the whole epoch, for the best rate of a shorter one is another.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper.costs import estimate
from scripts.paper.records import Records
from scripts.paper.runner import Find, Recipe, Run, count_steps, main
from scripts.paper.table1 import FLAGS
from scripts.paper.tables import format_table, mean_top1, show_top1, wrap

NETWORKS = {"vgg16": "VGG-16", "resnet18": "ResNet-18"}
KINDS = {"bn": "BatchNorm", "deconv": "deconvolution"}
SERIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of learning rates
RATES = {"bn": SERIES[1:5], "deconv": SERIES[3:6]}  # that all networks are tried with
DECAY, DECAYS = 1e-3, (5e-4, 2e-3)  # the paper's, and those tried with the best rate
SEEDS = (0, 1, 2)
BATCH = 128
STEPS = count_steps("cifar10", BATCH)

Pair = tuple[float, float]  # learning rate, weight decay


def plan(find: Find) -> list[Run]:
    runs = []
    for arch, kind in product(NETWORKS, KINDS):
        pairs, best = search(arch, kind, find)
        runs += [make_run(arch, kind, pair, SEEDS[0]) for pair in pairs]
        if best is not None:
            runs += [make_run(arch, kind, best, seed) for seed in SEEDS[1:]]
    return runs


def search(arch: str, kind: str, find: Find) -> tuple[list[Pair], Pair | None]:
    """The pairs to be tried as far as they follow from what is found, and the best when all are."""

    def choose() -> Pair | None:
        found = {pair: find(name_run(arch, kind, pair, SEEDS[0])) for pair in pairs}
        return None if None in found.values() else max(found, key=found.__getitem__)

    pairs = [(rate, DECAY) for rate in RATES[kind]]
    while (best := choose()) and find(name_run(arch, kind, best, SEEDS[0])):  # 0: none is better
        if (more := _find_beyond(best[0], [rate for rate, _ in pairs])) is None:
            break
        pairs.append((more, DECAY))
    if best is None:
        return pairs, None
    pairs += [(best[0], decay) for decay in DECAYS]
    return pairs, choose()


def _find_beyond(best: float, rates: Sequence[float]) -> float | None:
    """The next of the series where the best one is the lowest or highest tried."""
    step = {min(rates): -1, max(rates): 1}.get(best, 0)
    place = SERIES.index(best) + step
    return SERIES[place] if step and 0 <= place < len(SERIES) else None


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
        learning rate and weight decay. Seed {SEEDS[0]}, all rates at weight decay {DECAY:g}, the
        next one where the best is the lowest or highest of them, and the best at other decays, and
        whatever else was run. ResNet-18's at lr 0.1 and decay 0.001 are also in Table 1:
        """
    best = f"""
        Then the best pair of each kind, which seed {SEEDS[0]} has chosen, with the seeds
        {", ".join(map(str, SEEDS))}:
        """
    return f"{wrap(text)}\n{_describe_grid(records)}\n{wrap(best)}\n{_describe_best(records)}"


def _describe_grid(records: Records) -> str:
    tried = [search_records(arch, kind, records)[0] for arch, kind in product(NETWORKS, KINDS)]
    rates = sorted({rate for pairs in tried for rate, _ in pairs})
    header = ["network", "layers", "weight decay", *(f"lr {rate:g}" for rate in rates)]
    rows = []
    for arch, kind, decay in product(NETWORKS, KINDS, sorted((DECAY, *DECAYS))):
        names = [name_run(arch, kind, (rate, decay), SEEDS[0]) for rate in rates]
        cells = [show_top1(records, [name]) for name in names]
        rows.append([NETWORKS[arch], KINDS[kind], f"{decay:g}", *cells])
    return format_table(header, rows)


def _describe_best(records: Records) -> str:
    header = ["network", "layers", "lr", "weight decay", "test top-1"]
    rows = []
    for arch in NETWORKS:
        lists = []
        for kind, title in KINDS.items():
            _, pair = search_records(arch, kind, records)
            lists.append([name_run(arch, kind, pair, seed) for seed in SEEDS] if pair else [])
            shown = [f"{value:g}" for value in pair] if pair else [None, None]
            rows.append([NETWORKS[arch], title, *shown, show_top1(records, lists[-1])])
        bn, deconv = (mean_top1(records, names) for names in lists)
        more = None if bn is None or deconv is None else f"{deconv - bn:+.2f}"
        rows.append([NETWORKS[arch], "deconvolution above BatchNorm", None, None, more])
    return format_table(header, rows)


def search_records(arch: str, kind: str, records: Records) -> tuple[list[Pair], Pair | None]:
    """The same from records, where one that has diverged counts as 0."""

    def find(name: str) -> float | None:
        return (mean_top1(records, [name]) or 0.0) if name in records else None

    return search(arch, kind, find)


RECIPE = Recipe("best_rates", "Best rates: each kind at its own", plan, page)

if __name__ == "__main__":
    main(RECIPE)
