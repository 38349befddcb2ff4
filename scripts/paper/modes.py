"""Compare modes 1 to 5 and blocks of 16 and 64: accuracy after one epoch, and time of a step.

    python scripts/paper/modes.py --cifar10 DIR

The trainings may share a machine. The steps are timed apart, on an idle machine, next to
BatchNorm's steps; the table reads them from results/:

    python scripts/bench/steps.py --mode 5 4 3 2 1 --block 16 64 --rounds 15 --no-memory --json FILE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper.costs import estimate
from scripts.paper.records import RESULTS, Records, load
from scripts.paper.runner import FindTop1, Recipe, Run, count_steps, main
from scripts.paper.tables import DASH, format_table, show_top1

BATCH_SIZE = 128
STEPS = count_steps("cifar10", BATCH_SIZE)
MODES = {
    1: "channels, then pixels (separable)",
    2: "pixels",
    3: "channels",
    4: "channels and pixels jointly, every patch",
    5: "channels and pixels jointly, sampled patches",
}
BLOCKS = (16, 64)
SEEDS = (0, 1, 2)
BASE = f"--arch vgg11 --batch-size {BATCH_SIZE} --epochs 1 --wd 5e-4"
BATCHNORM = "bn"
TIMES = "modes_steps"  # written to results/ by scripts/bench/steps.py


def plan(find_top1: FindTop1) -> list[Run]:
    kinds = [(BATCHNORM, "--deconv False --lr .01", None)]
    for mode, block in list_cases():
        flags = f"--deconv True --mode {mode} --lr .1 --eps 1e-2 --deconv-iter 5"
        flags += f" --num-groups {block}" if block else ""
        kinds.append((name_kind(mode, block), flags, mode))
    return [make_run(*kind, seed) for seed in SEEDS for kind in kinds]


def list_cases() -> list[tuple[int, int | None]]:
    """Return pairs of mode and block; mode 2 has one matrix of pixels for all channels."""
    return [(mode, block) for mode in MODES for block in ((None,) if mode == 2 else BLOCKS)]


def make_run(kind: str, flags: str, mode: int | None, seed: int) -> Run:
    arch = "vgg11" if kind.endswith("block64") else "vgg11, blocks of 16"
    slowdown = 2 if mode == 4 else 1  # mode 4 reads nine times as many patches
    times = estimate(arch, mode is not None, STEPS, BATCH_SIZE, slowdown=slowdown)
    return Run(f"{kind}-seed{seed}", "cifar10", f"{BASE} {flags} --seed {seed}", STEPS, **times)


def name_kind(mode: int, block: int | None) -> str:
    return f"mode{mode}-block{block}" if block else f"mode{mode}"


def format_tables(records: Records) -> dict[str, str]:
    header = ["mode", "whitened", "block (channels)", "test top-1 (%)", "step (ms)"]
    header += ["BatchNorm step (ms)", "ratio [quartiles]"]
    measured = load(TIMES, RESULTS)
    timed = [row for row in measured.get("rows", ()) if row["arch"] == "vgg11"]
    times = {(row["mode"], row["block"]): row["train"] for row in timed}
    rows = [["BatchNorm", None, None, _show_top1(records, BATCHNORM), None, None, None]]
    for mode, block in list_cases():
        cells = _show_times(times.get((mode, block or BLOCKS[0])))
        top1 = _show_top1(records, name_kind(mode, block))
        rows.append([mode, MODES[mode], block, top1, *cells])
    return {
        "modes": format_table(header, rows),
        "rounds": str(measured.get("flags", {}).get("rounds", DASH)),
        "machine": ", ".join(measured.get("environment", {}).values()) or DASH,
    }


def _show_top1(records: Records, kind: str) -> str:
    return show_top1(records, [f"{kind}-seed{seed}" for seed in SEEDS])


def _show_times(times: dict[str, Any] | None) -> list[str | None]:
    if times is None:
        return [None] * 3
    ours, base = (f"{1000 * times[f'{name}_seconds']:,.0f}" for name in ("deconv", "base"))
    return [ours, base, "{:.2f} [{:.2f}, {:.2f}]".format(times["ratio"], *times["quartiles"])]


RECIPE = Recipe("modes", "Modes and blocks", plan, format_tables)

if __name__ == "__main__":
    main(RECIPE)
