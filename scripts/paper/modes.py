"""Modes 1 to 5, blocks of 16 and 64: accuracy and seconds of VGG-11 after one epoch of CIFAR-10.

python scripts/paper/modes.py --cifar10 DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper.costs import estimate
from scripts.paper.engine import Find, Recipe, Run, count_steps, main
from scripts.paper.records import Records
from scripts.paper.tables import format_table, show_seconds, show_top1, wrap

BATCH = 128
STEPS = count_steps("cifar10", BATCH)
MODES = {
    1: "separable: channels, then pixels",
    2: "pixels",
    3: "channels",
    4: "both jointly, every patch",
    5: "both jointly, sampled patches",
}
BLOCKS = (16, 64)
BASE = "--arch vgg11 --batch-size 128 --epochs 1 --wd 5e-4 --seed 0"
BATCHNORM = "bn"


def plan(find: Find) -> list[Run]:
    runs = [make_run(BATCHNORM, "--deconv False --lr .01", None)]
    for mode in MODES:
        for block in list_blocks(mode):
            flags = f"--deconv True --mode {mode} --lr .1 --eps 1e-2 --deconv-iter 5"
            flags += f" --num-groups {block}" if block else ""
            runs.append(make_run(name_run(mode, block), flags, mode))
    return runs


def list_blocks(mode: int) -> tuple[int | None, ...]:
    """Mode 2 has none: the channels share one matrix of pixels."""
    return (None,) if mode == 2 else BLOCKS


def make_run(name: str, flags: str, mode: int | None) -> Run:
    arch = "vgg11" if name.endswith("block64") else "vgg11, blocks of 16"
    slower = 2 if mode == 4 else 1  # looks at nine times as many patches
    seconds = estimate(arch, mode is not None, STEPS, BATCH, slower=slower)
    return Run(name, "cifar10", f"{BASE} {flags}", STEPS, seconds)


def name_run(mode: int, block: int | None) -> str:
    return f"mode{mode}-block{block}" if block else f"mode{mode}"


def page(records: Records) -> str:
    header = ["mode", "what is whitened", "block", "test top-1", "seconds of training"]
    rows = [[None, "BatchNorm, lr .01", None, *_figures(records, BATCHNORM)]]
    for mode, text in MODES.items():
        for block in list_blocks(mode):
            rows.append([mode, text, block, *_figures(records, name_run(mode, block))])
    text = f"""
        CIFAR-10, VGG-11, one epoch, batch {BATCH}, weight decay 5e-4, cosine, seed 0; deconvolution
        at lr .1 with eps 1e-2. Seconds compare where a machine did nothing else.
        """
    return f"{wrap(text)}\n{format_table(header, rows)}"


def _figures(records: Records, name: str) -> tuple[str, str]:
    return show_top1(records, [name]), show_seconds(records, [name])


RECIPE = Recipe("modes", "Modes and blocks", plan, page)

if __name__ == "__main__":
    main(RECIPE)
