"""Batches of 2 to 512 pictures: VGG-11 on as many pictures of Fashion-MNIST, both kinds.

python scripts/paper/batch_size.py --data DIR
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper.costs import estimate
from scripts.paper.records import Records
from scripts.paper.runner import Find, Recipe, Run, main
from scripts.paper.tables import format_table, show_top1, wrap

SIZES = (2, 8, 32, 128, 512)
SEEN = 25_600  # pictures of a run
KINDS = {"bn": "BatchNorm", "deconv": "deconvolution"}
RATES = {"bn": 0.01, "deconv": 0.1}  # at 128; others in proportion
SEEDS = (0, 1, 2)
BASE = "--arch vgg11 --epochs 1 --wd 5e-4"


def plan(find: Find) -> list[Run]:
    return [make_run(*case) for case in product(SEEDS, KINDS, reversed(SIZES))]


def make_run(seed: int, kind: str, size: int) -> Run:
    steps, deconv = SEEN // size, kind == "deconv"
    flags = f"{BASE} --deconv {deconv} --batch-size {size} --lr {find_rate(kind, size):g}"
    flags += f" --max-steps {steps} --seed {seed}"
    seconds = estimate("vgg11, blocks of 16", deconv, steps, size)
    return Run(name_run(seed, kind, size), "fashion", flags, steps, seconds)


def find_rate(kind: str, size: int) -> float:
    return RATES[kind] * size / 128


def name_run(seed: int, kind: str, size: int) -> str:
    return f"{kind}-batch{size}-seed{seed}"


def page(records: Records) -> str:
    header = ["batch", "steps"]
    for title in KINDS.values():
        header += [f"{title}: lr", "test top-1"]
    rows = []
    for size in SIZES:
        row = [size, f"{SEEN // size:,}"]
        for kind in KINDS:
            names = [name_run(seed, kind, size) for seed in SEEDS]
            row += [f"{find_rate(kind, size):g}", show_top1(records, names)]
        rows.append(row)
    text = f"""
        Fashion-MNIST, VGG-11, {SEEN:,} pictures seen in every run, weight decay 5e-4, cosine. The
        learning rate is in proportion to the batch, {RATES["bn"]:g} for BatchNorm and
        {RATES["deconv"]:g} for deconvolution at 128, the better rates of either on CIFAR-10. Where
        one figure stands it is of seed 0, else the mean of {len(SEEDS)} seeds or of those shown.
        """
    return f"{wrap(text)}\n{format_table(header, rows)}"


RECIPE = Recipe("batch_size", "Batch size", plan, page)

if __name__ == "__main__":
    main(RECIPE)
