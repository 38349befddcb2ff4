"""Modes 1 to 5, blocks of 16 and 64: VGG-11 after one epoch of CIFAR-10, and what a step takes.

    python scripts/paper/modes.py --cifar10 DIR

Trainings may share a machine. Steps are timed apart, on one that does nothing else, each beside
BatchNorm's; what this writes is in results/ and goes into the table:

    python scripts/bench/steps.py --mode 5 4 3 2 1 --block 16 64 --rounds 15 --no-memory --json FILE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper.costs import estimate
from scripts.paper.records import RESULTS, Records, load
from scripts.paper.runner import Find, Recipe, Run, count_steps, main
from scripts.paper.tables import format_table, show_top1, wrap

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
TIMES = "modes_steps"  # by benchmark.py, in results/


def plan(find: Find) -> list[Run]:
    kinds = [(BATCHNORM, "--deconv False --lr .01", None)]
    for mode in MODES:
        for block in list_blocks(mode):
            flags = f"--deconv True --mode {mode} --lr .1 --eps 1e-2 --deconv-iter 5"
            flags += f" --num-groups {block}" if block else ""
            kinds.append((name_kind(mode, block), flags, mode))
    return [make_run(*kind, seed) for seed in SEEDS for kind in kinds]


def list_blocks(mode: int) -> tuple[int | None, ...]:
    """Mode 2 has one matrix of pixels for all channels: blocks say how many patches it is from."""
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
    header = ["mode", "what is whitened", "block", "test top-1"]
    header += ["step (ms)", "BatchNorm's", "ratio"]
    measured = load(TIMES, RESULTS)
    found = [row for row in measured.get("rows", ()) if row["arch"] == "vgg11"]
    times = {(row["mode"], row["block"]): row["train"] for row in found}
    rows = [[None, "BatchNorm, lr .01", None, _show(records, BATCHNORM), None, None, None]]
    for mode, text in MODES.items():
        for block in list_blocks(mode):
            cells = _show_times(times.get((mode, block or BLOCKS[0])))
            rows.append([mode, text, block, _show(records, name_kind(mode, block)), *cells])
    text = f"""
        CIFAR-10, VGG-11, one epoch, batch {BATCH}, weight decay 5e-4, cosine, seeds
        {", ".join(map(str, SEEDS))}; deconvolution at lr .1 with eps 1e-2, BatchNorm at the better
        of .1 and .01. {_describe_times(measured)}
        """
    return f"{wrap(text)}\n{format_table(header, rows)}"


def _describe_times(measured: dict[str, Any]) -> str:
    if not measured:
        return ""
    rounds, machine = measured["flags"]["rounds"], ", ".join(measured["environment"].values())
    return f"""
        Steps of training: medians of {rounds}, the two networks in turn, with the quartiles of
        their ratio; {machine}, and nothing else running. By `python scripts/bench/steps.py --mode
        {" ".join(map(str, measured["flags"]["mode"]))} --block 16 64 --rounds {rounds} --no-memory
        --json results/{TIMES}.json`.
        """


def _show(records: Records, kind: str) -> str:
    return show_top1(records, [name_run(kind, seed) for seed in SEEDS])


def _show_times(times: dict[str, Any] | None) -> list[str | None]:
    if times is None:
        return [None] * 3
    ours, base = (f"{1000 * times[f'{name}_seconds']:,.0f}" for name in ("deconv", "base"))
    lower, upper = times["quartiles"]
    return [ours, base, f"{times['ratio']:.2f} [{lower:.2f}, {upper:.2f}]"]


RECIPE = Recipe("modes", "Modes and blocks", plan, page)

if __name__ == "__main__":
    main(RECIPE)
