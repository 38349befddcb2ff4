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
SEEDS = (0, 1, 2)
BASE = "--arch vgg11 --batch-size 128 --epochs 1 --wd 5e-4"
BATCHNORM = "bn"


def plan(find: Find) -> list[Run]:
    kinds = [(BATCHNORM, "--deconv False --lr .01", None)]
    for mode in MODES:
        for block in list_blocks(mode):
            flags = f"--deconv True --mode {mode} --lr .1 --eps 1e-2 --deconv-iter 5"
            flags += f" --num-groups {block}" if block else ""
            kinds.append((name_kind(mode, block), flags, mode))
    return [make_run(*kind, seed) for seed in SEEDS for kind in kinds]


def list_blocks(mode: int) -> tuple[int | None, ...]:
    """Mode 2 has none: the channels share one matrix of pixels."""
    return (None,) if mode == 2 else BLOCKS


def make_run(kind: str, flags: str, mode: int | None, seed: int) -> Run:
    arch = "vgg11" if kind.endswith("block64") else "vgg11, blocks of 16"
    slower = 2 if mode == 4 else 1  # looks at nine times as many patches
    seconds = estimate(arch, mode is not None, STEPS, BATCH, slower=slower)
    return Run(name_run(kind, seed), "cifar10", f"{BASE} {flags} --seed {seed}", STEPS, seconds)


def name_kind(mode: int, block: int | None) -> str:
    return f"mode{mode}-block{block}" if block else f"mode{mode}"


def name_run(kind: str, seed: int) -> str:
    return f"{kind}-seed{seed}"


def page(records: Records) -> str:
    header = ["mode", "what is whitened", "block", "test top-1", "seconds of training"]
    rows = [[None, "BatchNorm, lr .01", None, *_figures(records, BATCHNORM)]]
    for mode, text in MODES.items():
        for block in list_blocks(mode):
            rows.append([mode, text, block, *_figures(records, name_kind(mode, block))])
    text = f"""
        CIFAR-10, VGG-11, one epoch, batch {BATCH}, weight decay 5e-4, cosine, seeds
        {", ".join(map(str, SEEDS))}; deconvolution at lr .1 with eps 1e-2. Seconds are of seed
        {SEEDS[0]}, and compare where a machine did nothing else.
        """
    return f"{wrap(text)}\n{format_table(header, rows)}"


def _figures(records: Records, kind: str) -> tuple[str, str]:
    names = [name_run(kind, seed) for seed in SEEDS]
    return show_top1(records, names), show_seconds(records, names[:1])


RECIPE = Recipe("modes", "Modes and blocks", plan, page)

if __name__ == "__main__":
    main(RECIPE)
