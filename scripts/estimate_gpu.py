"""What the layers of whole networks would take on a large GPU, on paper and where there is one.

A step takes, forward and backward apiece, the longest of three: its flops at the peak, its bytes at
full bandwidth, its launches one after the other. No kernel reaches the first two, so the figures
are what to hope for, and the ratios what to check.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from deconv import Delinear, FastDeconv
from deconv.inverse_sqrt import ROOTS
from scripts import benchmark, count_cost
from scripts.count_cost import Both, Cost, Sizes
from scripts.count_launches import META, RUNNING, count_on_paper
from scripts.profile_layer import CONVOLUTION, DIRECTIONS, WHOLE
from scripts.time_layer import STEPS, Times, plain_twin
from util.parser import Parser, real

SMALL_SIDE, CLASSES = 64, (10, 1000)  # pictures up to that side are of few classes
TITLES = ("layer", "times", "BatchNorm", *STEPS, RUNNING, "deconv", "ratio", "launches")
GPU = torch.device("cuda")

Shape = tuple[int, ...]
Measure = Callable[[nn.Module, Shape], Times]


@dataclass(frozen=True)
class Gpu:
    """Peaks in flops and bytes a second; seconds from one launch to the next."""

    flops: float
    conv_flops: float
    bandwidth: float
    launch: float

    def seconds(self, costs: Both, launches: Sequence[float], *, convolves: bool) -> float:
        """Of one step forward and backward."""
        peak = self.conv_flops if convolves else self.flops
        return sum(
            max(cost.flops / peak, cost.bytes / self.bandwidth, self.launch * number)
            for cost, number in zip(costs, launches, strict=True)
        )


@dataclass(frozen=True)
class Estimate:
    """Seconds of a layer and of its plain twin, and launches; measured ones where there are any."""

    layer: nn.Module
    shape: Shape
    times: int
    base: float
    steps: dict[str, float]
    launches: int
    measured: Times | None

    @property
    def ours(self) -> float:
        return sum(self.steps.values())


def add_gpu_flags(parser: Parser) -> None:
    """The networks and the GPU of the estimate: an H100 SXM5.

    Source: NVIDIA H100 Tensor Core GPU Architecture, white paper; the time of a launch is assumed.
    """
    add = parser.add_group("a GPU on paper")
    networks = ("vgg11:128:32", "resnet18:128:32", "resnet50d:64:224")
    text = "networks, pictures in a step and their side"
    kinds = {"nargs": "+", "metavar": "NAME:N:SIDE"}
    parsed = [network(word) for word in networks]
    add("--networks", text, network, parsed, " ".join(networks), **kinds)
    add("--gpu-tflops", "peak of float32 products, TFLOP/s", real(above=0), 66.9)
    add("--gpu-conv-tflops", "peak of convolutions, in TF32", real(above=0), 494.7)
    add("--gpu-bandwidth", "of its memory, GB/s", real(above=0), 3350)
    add("--gpu-launch", "microseconds from launch to launch", real(least=0), 5)


def network(text: str) -> tuple[str, int, int]:
    """NAME:N:SIDE."""
    name, *numbers = text.split(":")
    if len(numbers) != 2 or not all(word.isdecimal() and int(word) for word in numbers):
        raise argparse.ArgumentTypeError(f"expected NAME:N:SIDE, as vgg11:128:32, got {text!r}")
    return name, int(numbers[0]), int(numbers[1])


def read_gpu(flags: argparse.Namespace) -> Gpu:
    tera, giga, micro = 1e12, 1e9, 1e-6
    return Gpu(
        flags.gpu_tflops * tera,
        flags.gpu_conv_tflops * tera,
        flags.gpu_bandwidth * giga,
        flags.gpu_launch * micro,
    )


def describe_gpu(flags: argparse.Namespace) -> str:
    peaks = f"{flags.gpu_tflops:g} TFLOP/s in products, {flags.gpu_conv_tflops:g} in convolutions"
    return f"{peaks}, {flags.gpu_bandwidth:g} GB/s, {flags.gpu_launch:g} microseconds a launch"


def build(
    name: str, side: int, flags: argparse.Namespace, device: torch.device, **options: object
) -> nn.Module:
    """A network with our layers, on the meta device where it need not hold numbers.

    Raises:
        ValueError, TypeError: as `benchmark.build`.
    """
    case = benchmark.Case(name, flags.mode, flags.block[0], 1, "float32")
    shape = {"image_size": side, "classes": CLASSES[side > SMALL_SIDE], "in_channels": 3}
    option = [*flags.option, *options.items()]
    how = argparse.Namespace(block_fc=None, eps=flags.eps, option=option, **shape)
    with device:
        return benchmark.build(case, benchmark.OURS, how)


@torch.no_grad()
def find_layers(model: nn.Module, shape: Shape) -> list[tuple[nn.Module, Shape, int]]:
    """The deconvolution layers that a batch of `shape` meets, equal ones once, and their number."""
    found: dict[tuple[str, Shape], list[str]] = {}
    described = deepcopy(model).to(META).eval()

    def note(name: str, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        found.setdefault((repr(layer), tuple(inputs[0].shape)), []).append(name)

    for name, layer in described.named_modules():
        if isinstance(layer, FastDeconv | Delinear):
            layer.register_forward_pre_hook(partial(note, name))
    described(torch.empty(shape, device=META))
    return [(model.get_submodule(same[0]), seen, len(same)) for (_, seen), same in found.items()]


def estimate(
    layer: nn.Module, shape: Shape, times: int, gpu: Gpu, measure: Measure | None = None
) -> Estimate:
    """A layer that stands in a network so many times; `measure` is asked for its measured times."""
    sizes = count_cost.measure_sizes(layer, shape, GPU)
    costs = count_cost.count(sizes) | {RUNNING: (Cost(), Cost())}
    launches = count_on_paper(layer, shape)
    convolves = isinstance(layer, FastDeconv)
    steps = {
        step: gpu.seconds(
            costs[step],
            [launches["", step, way] for way in DIRECTIONS],
            convolves=convolves and step == CONVOLUTION,
        )
        for step in (*STEPS, RUNNING)
    }
    every = sum(launches["", WHOLE, way] for way in DIRECTIONS)
    times_here = measure(layer, shape) if measure else None
    base = _estimate_twin(plain_twin(layer).to(META), shape, sizes, gpu)
    return Estimate(layer, shape, times, base, steps, round(every), times_here)


def _estimate_twin(twin: nn.Module, shape: Shape, sizes: Sizes, gpu: Gpu) -> float:
    """Seconds of a linear layer, or of a convolution and its BatchNorm."""

    def launches(module: nn.Module) -> np.ndarray:
        counted = count_on_paper(module, shape)
        return np.array([counted["", WHOLE, way] for way in DIRECTIONS])

    costs, every = count_cost.convolution(sizes), launches(twin)
    if not isinstance(twin, nn.Sequential):
        return gpu.seconds(costs, every, convolves=False)
    own = launches(twin[0])
    norm = gpu.seconds(count_cost.batchnorm(sizes), every - own, convolves=False)
    return gpu.seconds(costs, own, convolves=True) + norm


def compare_networks(flags: argparse.Namespace, measure: Measure | None) -> str:
    """A table of whole networks with either root, and one of the layers of each network."""
    gpu, titles = read_gpu(flags), ("BatchNorm (ms)", "deconv (ms)", "ratio", "launches")
    lines = [f"| network | batch | root | {' | '.join(titles)} |", f"|---|---:|---|{'---:|' * 4}"]
    details = []
    for name, batch, side in flags.networks:
        for root in ROOTS:
            model = build(name, side, flags, torch.device("cpu") if measure else META, root=root)
            layers = find_layers(model, (batch, 3, side, side))
            rows = [estimate(*one, gpu, measure) for one in layers]
            cells = format_sums(rows, unit=1e-3)
            lines.append(f"| {name} | {batch} | {root} | {' | '.join(cells)} |")
            if root == dict(flags.option).get("root", ROOTS[0]):
                head = f"{name}, {batch} pictures of {side} x {side}, root={root}, microseconds:"
                details += ["", head, "", format_layers(rows)]
    return "\n".join([*lines, *details])


def format_sums(rows: Sequence[Estimate], unit: float) -> list[str]:
    """Base, ours, ratio and launches of all layers together."""

    def add(read: Callable[[Estimate], float]) -> float:
        return sum(row.times * read(row) for row in rows)

    base, ours = add(lambda row: row.base), add(lambda row: row.ours)
    measured = [None] * 3
    if all(row.measured for row in rows):
        pair = add(lambda row: row.measured.base), add(lambda row: row.measured.ours)
        measured = [pair[0] / unit, pair[1] / unit, pair[1] / pair[0]]
    cells = map(format_both, (base / unit, ours / unit, ours / base), measured)
    return [*cells, f"{add(lambda row: row.launches):.0f}"]


def format_layers(rows: Sequence[Estimate]) -> str:
    """A row for each layer, in microseconds of forward and backward."""
    lines = [f"| {' | '.join(TITLES)} |", f"|---|{'---:|' * (len(TITLES) - 1)}"]
    micro = 1e-6
    for row in rows:
        seen = row.measured
        pairs = [(row.base, seen and seen.base)]
        pairs += [(row.steps[step], seen and seen.step(step)) for step in STEPS]
        pairs += [(row.steps[RUNNING], None), (row.ours, seen and seen.ours)]
        cells = [format_both(paper / micro, real and real / micro) for paper, real in pairs]
        cells.append(format_both(row.ours / row.base, seen and seen.ratio))
        head = f"| {describe(row.layer, row.shape)} | {row.times} "
        lines.append(f"{head}| {' | '.join(cells)} | {row.launches} |")
    return "\n".join(lines)


def describe(layer: nn.Module, shape: Shape) -> str:
    """64 -> 128, 32 x 32, kernel 3, stride 2."""
    if isinstance(layer, Delinear):
        return f"{layer.in_features} -> {layer.out_features}, linear"
    stride = f", stride {layer.stride[0]}" if layer.stride[0] > 1 else ""
    pair = f"{layer.in_channels} -> {layer.out_channels}, {shape[2]} x {shape[3]}"
    return f"{pair}, kernel {layer.kernel_size[0]}{stride}"


def format_both(paper: float, measured: float | None = None) -> str:
    """The estimate and, where there is one, what was measured."""
    return short(paper) if measured is None else f"{short(paper)} / {short(measured)}"


def short(value: float) -> str:
    """Three digits, all of those before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
