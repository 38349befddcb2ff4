"""Draw the first layer of a VGG-11 trained on natural images, and the whiteness of all layers.

    python scripts/paper/filters.py --cifar10 DIR

Trains one epoch of CIFAR-10, then draws docs/results_filters.png with `scripts/inspect_layers.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper.costs import estimate
from scripts.paper.records import Records
from scripts.paper.runner import FindTop1, Recipe, Run, count_steps, main
from scripts.paper.tables import show_top1
from util.checkpoint.store import LATEST_NAME

NAME, PLOT = "vgg11-deconv-seed0", "results_filters.png"
BATCH_SIZE = 128
STEPS = count_steps("cifar10", BATCH_SIZE)
FLAGS = f"--arch vgg11 --deconv True --mode 5 --batch-size {BATCH_SIZE} --epochs 1 --lr .1"
FLAGS += " --wd 5e-4 --num-groups 16 --eps 1e-2 --seed 0"


def plan(find_top1: FindTop1) -> list[Run]:
    times = estimate("vgg11, blocks of 16", True, STEPS, BATCH_SIZE)
    return [Run(NAME, "cifar10", FLAGS, STEPS, **times)]


def list_plot_commands(folder: Path, cifar10: str) -> list[list[str]]:
    paths = [str(folder / NAME / LATEST_NAME), f"docs/{PLOT}", "--data", cifar10]
    return [[sys.executable, "scripts/inspect_layers.py", *paths]]


def format_tables(records: Records) -> dict[str, str]:
    return {"top1": show_top1(records, [NAME])}


RECIPE = Recipe("filters", "Filters", plan, format_tables, follow_up=list_plot_commands)

if __name__ == "__main__":
    main(RECIPE)
