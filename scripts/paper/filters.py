"""What the filters look like: the first layer of a VGG-11 trained on natural pictures, and on.

    python scripts/paper/filters.py --cifar10 DIR

Trains one epoch of CIFAR-10, then draws docs/results_filters.png by `scripts/inspect_layers.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper.costs import estimate
from scripts.paper.records import Records
from scripts.paper.runner import Find, Recipe, Run, count_steps, main
from scripts.paper.tables import show_top1, wrap
from util.checkpoint.store import LATEST_NAME

NAME, PICTURE = "vgg11-deconv-seed0", "results_filters.png"
BATCH = 128
STEPS = count_steps("cifar10", BATCH)


def plan(find: Find) -> list[Run]:
    flags = f"--arch vgg11 --deconv True --mode 5 --batch-size {BATCH} --epochs 1 --lr .1 --wd 5e-4"
    seconds = estimate("vgg11, blocks of 16", True, STEPS, BATCH)
    return [Run(NAME, "cifar10", f"{flags} --num-groups 16 --eps 1e-2 --seed 0", STEPS, seconds)]


def inspect(folder: Path, cifar10: str) -> list[list[str]]:
    """The command that draws the picture."""
    where = [str(folder / NAME / LATEST_NAME), f"docs/{PICTURE}", "--data", cifar10]
    return [[sys.executable, "scripts/inspect_layers.py", *where]]


def page(records: Records) -> str:
    text = wrap(f"""
        VGG-11 after one epoch of CIFAR-10, mode 5, blocks of 16, eps 1e-2, lr .1, weight decay
        5e-4, seed 0; test top-1 {show_top1(records, [NAME])}. Its first filters as learned and as
        the raw picture meets them, the whitening kernels of the first layer (a centre against its
        surround), how the features of a block of the last convolution correlate, and how white what
        each layer sees is, before and after.
        """)
    return f"{text}\n![Filters and whiteness]({PICTURE})\n" if records else text


RECIPE = Recipe("filters", "What the filters look like", plan, page, after=inspect)

if __name__ == "__main__":
    main(RECIPE)
