"""Train VGG-11 with batches of 2 to 512 images of Fashion-MNIST, with both kinds of layer.

python scripts/paper/batch_size.py --data DIR
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper.costs import estimate
from scripts.paper.records import Records
from scripts.paper.runner import FindTop1, Recipe, Run, main
from scripts.paper.tables import KINDS, format_table, show_top1

SIZES = (2, 8, 32, 128, 512)
IMAGES = 25_600  # seen in a run
RATES = {"bn": 0.01, "deconv": 0.1}  # at batch size 128
SEEDS = (0, 1, 2)


def plan(find_top1: FindTop1) -> list[Run]:
    return [make_run(*case) for case in product(SEEDS, KINDS, reversed(SIZES))]


def make_run(seed: int, kind: str, size: int) -> Run:
    steps, deconv = IMAGES // size, kind == "deconv"
    flags = f"--arch vgg11 --epochs 1 --wd 5e-4 --deconv {deconv} --batch-size {size}"
    flags += f" --lr {scale_rate(kind, size):g} --max-steps {steps} --seed {seed}"
    times = estimate("vgg11, blocks of 16", deconv, steps, size)
    return Run(name_run(seed, kind, size), "fashion", flags, steps, **times)


def scale_rate(kind: str, size: int) -> float:
    """Return the learning rate, in proportion to the batch size."""
    return RATES[kind] * size / 128


def name_run(seed: int, kind: str, size: int) -> str:
    return f"{kind}-batch{size}-seed{seed}"


def format_tables(records: Records) -> dict[str, str]:
    header = ["batch size", "steps"]
    for title in KINDS.values():
        header += [f"{title}: lr", f"{title}: test top-1 (%)"]
    rows = []
    for size in SIZES:
        row = [size, f"{IMAGES // size:,}"]
        for kind in KINDS:
            names = [name_run(seed, kind, size) for seed in SEEDS]
            row += [f"{scale_rate(kind, size):g}", show_top1(records, names)]
        rows.append(row)
    return {"sizes": format_table(header, rows)}


RECIPE = Recipe("batch_size", "Batch size", plan, format_tables)

if __name__ == "__main__":
    main(RECIPE)
