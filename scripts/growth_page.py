"""The tables and the words of the page that `growth.py` writes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scripts.count_cost import Both, Sizes, convolution, total
from scripts.count_launches import RUNNING
from scripts.estimate_gpu import short
from scripts.profile_layer import DIRECTIONS, WHOLE, Key
from scripts.time_layer import STEPS, Times

MILLI, MEGA, GIGA, TERA = 1e-3, 1e6, 1e9, 1e12

PAGE = """\
# How cost grows

Written by

```sh
{command}
```

on {environment}; {load} at the start.
The *peak* is {peak} GFLOP/s: the best product of two square float32 matrices in this run. Times are
medians of forward and backward, input gradient included, of a layer in turn with a convolution and
BatchNorm; its steps are timed after that. Flops and bytes are counted on paper
(`scripts/count_cost.py`): products alone are flops, two for a multiplication with its addition; a
product reads its factors and writes its result, every other pass reads what it is given and writes
what it makes. It is the plain method that is counted, which faster code may undercut. A convolution
may beat the peak, where torch convolves faster than it multiplies matrices.

## One layer, step by step

`{base}` on {shape}. Convolution includes the running statistics.

{steps}

## Growth

The same layer, one quantity at a time. Cells of the steps: milliseconds / GFLOP / MB, forward and
backward together. Last row: the power of the quantity that the milliseconds grow with, by least
squares.

![Milliseconds against each quantity]({picture})

{growth}

## Launches and graphs

Kernels that this layer launches in eager mode. By step: counted from the operators that the layer
calls on the meta device, where it goes the ways of a GPU; views and allocations do not count, what
a library does inside counts as one (`scripts/count_launches.py`). With CUDA the rows of the
profiler follow. The aim is 25; the published code launches 60 or more.

{launches}

Graphs that `torch.compile` makes of a forward; 1: nothing breaks it. On the meta device with the
ways of a GPU.

{graphs}

## A large GPU

On paper: {gpu}.
The defaults are those of an H100 SXM5 (NVIDIA H100 Tensor Core GPU Architecture, white paper),
convolutions in TF32 without sparsity, as PyTorch has them by default; the time between launches is
an assumption about eager mode, and that of a replayed CUDA graph nearer to `--gpu-launch 1.5`. A
step takes the longest of three, forward and backward apiece: its flops at the peak, its bytes at
full bandwidth, its launches one after the other. That is what to hope for, not what to expect.
Layers alone, without what lies between them. With CUDA cells read: on paper / measured, where the
measured convolution includes the running statistics.

{networks}
"""


@dataclass(frozen=True)
class Row:
    """A layer as it was measured and as it is counted."""

    times: Times
    sizes: Sizes
    costs: dict[str, Both]

    def share(self, peak: float) -> float:
        return total(*self.costs.values()).flops / self.times.ours / peak

    def base_share(self, peak: float) -> float:
        return total(convolution(self.sizes)).flops / self.times.base / peak


def format_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def format_steps(row: Row, peak: float) -> str:
    """Each step forward and backward: measured, counted, and the speed that follows."""
    titles = ("(ms)", "GFLOP", "MB", "of peak", "GB/s")
    lines = []
    for step in STEPS:
        cells = [step]
        for way, cost in zip(DIRECTIONS, row.costs[step], strict=True):
            seconds = row.times.steps[step, way]
            cells += [short(seconds / MILLI), short(cost.flops / GIGA), short(cost.bytes / MEGA)]
            cells.append(percent(cost.flops / seconds / peak) if cost.flops else "-")
            cells.append(short(cost.bytes / seconds / GIGA))
        lines.append(cells)
    return format_table(["step", *(f"{way} {t}" for way in DIRECTIONS for t in titles)], lines)


def format_growth(title: str, rows: Mapping[int, Row], peak: float) -> str:
    """A row for each value of a quantity, and the powers of it that times grow with."""
    titles = [title, "BatchNorm (ms)", "of peak", "deconv (ms)", "of peak", "ratio", *STEPS]
    lines = []
    for value, row in rows.items():
        times, base, share = row.times, row.base_share(peak), row.share(peak)
        cells = [str(value), short(times.base / MILLI), percent(base)]
        cells += [short(times.ours / MILLI), percent(share), f"{times.ratio:.2f}"]
        lines.append([*cells, *(_format_step(row, step) for step in STEPS)])
    powers = {name: power(list(rows), line) for name, line in draw_lines(rows.values()).items()}
    base, ours, *steps = powers.values()
    return format_table(titles, [*lines, ["power", base, "", ours, "", "", *steps]])


def _format_step(row: Row, step: str) -> str:
    cost = total(row.costs[step])
    numbers = row.times.step(step) / MILLI, cost.flops / GIGA, cost.bytes / MEGA
    return " / ".join(map(short, numbers))


def draw_lines(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Milliseconds by name: the plain twin, the layer, and its steps."""
    lines = {"BatchNorm": [row.times.base / MILLI for row in rows]}
    lines["deconv"] = [row.times.ours / MILLI for row in rows]
    return lines | {step: [row.times.step(step) / MILLI for row in rows] for step in STEPS}


def power(values: Sequence[float], times: Sequence[float]) -> str:
    """The exponent a of times ~ values^a."""
    if len(values) < 2 or min(times) <= 0:
        return "-"
    return f"{np.polyfit(np.log(values), np.log(times), 1)[0]:.2f}"


def format_launches(
    counts: Mapping[str, Counter[Key]], measured: Mapping[str, Mapping[str, Mapping[str, int]]]
) -> str:
    """Launches of several layers by step; `measured` has rows of names, by layer and direction."""
    titles = ["step", *(f"{name}, {way}" for name in counts for way in DIRECTIONS)]
    lines = [
        [step, *(f"{layer['', step, way]:.0f}" for layer in counts.values() for way in DIRECTIONS)]
        for step in (*STEPS, RUNNING, WHOLE)
    ]
    for title, by_layer in measured.items():
        lines.append([title, *(str(by_layer[name][way]) for name in counts for way in DIRECTIONS)])
    return format_table(titles, lines)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
