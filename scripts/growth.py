"""How a layer's cost grows with five quantities, its launches, and a GPU on paper: a page.

    python scripts/growth.py                       docs/growth.md and, beside it, growth.png
    python scripts/growth.py --out cholesky.md --block 64 16 32 128 --option root=cholesky

The base layer has the first value of each quantity; each in turn then takes its other values. On a
machine with CUDA the same command adds what the GPU measures to what is counted here.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from deconv import FastDeconv
from deconv.inverse_sqrt import ROOTS
from scripts import benchmark, count_cost
from scripts.count_launches import META, count_graphs, count_on_gpu, count_on_paper
from scripts.estimate_gpu import (
    Measure,
    add_gpu_flags,
    build,
    compare_networks,
    describe_gpu,
    short,
)
from scripts.growth_page import (
    GIGA,
    PAGE,
    Row,
    draw_lines,
    format_growth,
    format_launches,
    format_steps,
    format_table,
)
from scripts.time_layer import measure_peak, plain_twin, time_layer
from util.checkpoint import atomic_write
from util.compute import Compute
from util.parser import Parser, real, whole
from util.plots import plot_growth

# Each quantity, what it is, and its values: that of the base layer first.
QUANTITIES = {
    "batch_size": ("pictures in a step", (64, 16, 32, 128, 256)),
    "side": ("side of the map (pixels)", (16, 4, 8, 32)),
    "channels": ("channels, in and out", (128, 32, 64, 256)),
    "block": ("channels whitened together", (16, 4, 8, 32, 64)),
    "kernel": ("side of the kernel (pixels)", (3, 1, 5, 7)),
}
PAGE_AT = Path(__file__).resolve().parent.parent / "docs" / "growth.md"
GRAPHS_OF = (4, 8, 8, 8, 3)  # a small layer makes as many graphs as a large one

Point = tuple[int, ...]  # a value of each quantity


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    flags = parser.parse_args(words)
    device = benchmark.find_device(parser, flags)
    check(parser, flags)
    load = describe_load()
    torch.manual_seed(0)
    compute = Compute(device, channels_last=flags.channels_last)
    clock = partial(time_layer, compute=compute, rounds=flags.rounds, warmup=flags.warmup)
    peak, growth = measure_peak(device), measure_growth(flags, clock, device)
    lines = {name: (list(line), draw_lines(line.values())) for name, line in growth.items()}
    plot_growth(lines, picture_of(flags))
    page = make_page(words, load, growth, peak, flags, clock, device)
    with atomic_write(flags.out) as file:
        file.write(page.encode())
    print(f"{flags.out}, {picture_of(flags)}")


def make_parser() -> Parser:
    parser = Parser("growth.py", __doc__.splitlines()[0])
    add = parser.add_group("what varies; the base layer has the first value of each")
    for name, (text, values) in QUANTITIES.items():
        shown = " ".join(map(str, values))
        flag = f"--{name.replace('_', '-')}"
        add(flag, text, whole(1), list(values), shown, nargs="+", metavar="N")
    add = parser.add_group("layers")
    add("--mode", "of the deconvolution", whole(1, 5), 5, metavar="M")
    add("--eps", "regularisation, in units of variance", real(above=0), 1e-2)
    text = f"further keywords of FastDeconv: {', '.join(benchmark.OPTIONS)}"
    add("--option", text, benchmark.option, [], "", nargs="+", metavar="NAME=VALUE")
    add_gpu_flags(parser)
    benchmark.add_run_flags(parser)
    add = parser.add_group("output")
    add(
        "--out",
        "the page; its picture lies beside it",
        Path,
        PAGE_AT,
        "docs/growth.md",
        metavar="FILE",
    )
    return parser


def describe_load() -> str:
    """How busy the machine is: times beside other work are to be read with care."""
    try:
        return f"load average {os.getloadavg()[0]:.1f}"
    except (AttributeError, OSError):  # not every system tells
        return "load average unknown"


def picture_of(flags: argparse.Namespace) -> Path:
    return flags.out.with_suffix(".png")


def base_point(flags: argparse.Namespace) -> Point:
    return tuple(getattr(flags, name)[0] for name in QUANTITIES)


def vary(flags: argparse.Namespace) -> dict[str, dict[int, Point]]:
    """For each quantity its values in rising order, and the points at which it alone varies."""
    base = base_point(flags)
    return {
        name: {
            value: (*base[:place], value, *base[place + 1 :])
            for value in sorted(set(getattr(flags, name)))
        }
        for place, name in enumerate(QUANTITIES)
    }


def check(parser: Parser, flags: argparse.Namespace) -> None:
    """Refuse what would fail after minutes of measuring."""
    if flags.out.suffix != ".md" or not flags.out.absolute().parent.is_dir():
        parser.error(f"--out {flags.out}: expected a file .md in a folder that is there")
    base = base_point(flags)
    try:
        make_layer(base, flags)(torch.empty(shape_of(base), device=META))
    except (RuntimeError, TypeError, ValueError) as error:
        parser.error(f"{benchmark.name_options(flags)}{error}")
    for name, _, side in flags.networks:
        try:
            build(name, side, flags, META)
        except (TypeError, ValueError) as error:
            parser.error(f"--networks {name}: {error}")


def make_layer(
    point: Point, flags: argparse.Namespace, device: torch.device = META, **options: object
) -> FastDeconv:
    _, _, channels, block, kernel = point
    how = {"mode": flags.mode, "block": block, "eps": flags.eps, **dict(flags.option), **options}
    return FastDeconv(channels, channels, kernel, padding=kernel // 2, device=device, **how)


def shape_of(point: Point) -> tuple[int, int, int, int]:
    batch_size, side, channels, _, _ = point
    return batch_size, channels, side, side


def measure_growth(
    flags: argparse.Namespace, clock: Measure, device: torch.device
) -> dict[str, dict[int, Row]]:
    """By what each quantity is: a row for each of its values. The base layer is measured once."""
    rows: dict[Point, Row] = {}
    growth: dict[str, dict[int, Row]] = {}
    for name, line in vary(flags).items():
        for point in line.values():
            if point not in rows:
                layer, shape = make_layer(point, flags, device), shape_of(point)
                sizes = count_cost.measure_sizes(layer, shape, device)
                rows[point] = Row(clock(layer, shape), sizes, count_cost.count(sizes))
        growth[QUANTITIES[name][0]] = {value: rows[point] for value, point in line.items()}
    return growth


def make_page(
    words: Sequence[str],
    load: str,
    growth: Mapping[str, Mapping[int, Row]],
    peak: float,
    flags: argparse.Namespace,
    clock: Measure,
    device: torch.device,
) -> str:
    base = base_point(flags)
    return PAGE.format(
        command=shlex.join(["python", "scripts/growth.py", *words]),
        environment=", ".join(benchmark.describe_environment(device).values()),
        load=load,
        peak=short(peak / GIGA),
        base=repr(make_layer(base, flags)),
        shape=" x ".join(map(str, shape_of(base))),
        steps=format_steps(next(iter(growth.values()))[base[0]], peak),
        picture=picture_of(flags).name,
        growth="\n\n".join(format_growth(name, line, peak) for name, line in growth.items()),
        launches=make_launches(base, flags, device),
        graphs=make_graphs(flags, device),
        gpu=describe_gpu(flags),
        networks=compare_networks(flags, clock if device.type == "cuda" else None),
    )


def make_launches(base: Point, flags: argparse.Namespace, device: torch.device) -> str:
    """Of the base layer with either root, beside its plain twin."""
    layers: dict[str, nn.Module] = {
        root: make_layer(base, flags, torch.device("cpu"), root=root) for root in ROOTS
    }
    layers = {"BatchNorm": plain_twin(layers[ROOTS[0]]), **layers}
    shape = shape_of(base)
    on_paper = {name: count_on_paper(layer, shape) for name, layer in layers.items()}
    measured = {}
    if device.type == "cuda":
        for title, compiled in (("profiler", False), ("profiler, torch.compile", True)):
            count = partial(count_on_gpu, shape=shape, device=device, compiled=compiled)
            measured[title] = {name: count(layer) for name, layer in layers.items()}
    return format_launches(on_paper, measured)


def make_graphs(flags: argparse.Namespace, device: torch.device) -> str:
    """Graphs by root and mode; without a GPU on the meta device too, which takes a GPU's ways."""
    lines = []
    for place in dict.fromkeys([device, META] if device.type == "cpu" else [device]):
        for root in ROOTS:
            layer = make_layer(GRAPHS_OF, flags, place, root=root)
            shape = shape_of(GRAPHS_OF)
            counts = [count_graphs(layer, shape, training=training) for training in (True, False)]
            lines.append([f"{place.type}, root={root}", *map(str, counts)])
    return format_table(("device", "training", "evaluation"), lines)


if __name__ == "__main__":
    main()
