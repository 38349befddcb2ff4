"""Seconds of one deconvolution layer beside its plain twin with BatchNorm, and of its steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from deconv import Delinear, FastDeconv
from scripts import benchmark, profile_layer
from scripts.profile_layer import CONVOLUTION, DIRECTIONS, NAMES
from util.compute import Compute

STEPS = (*NAMES, CONVOLUTION)
PEAK_ROUNDS = 7
PEAK_SIDES = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product finds the peak


@dataclass(frozen=True)
class Times:
    """Seconds of forward and backward together, medians.

    Args:
        base, ours: of the plain twin and of the layer, in turn.
        ratio: median of ours / base over the pairs.
        steps: seconds by step and direction, measured after the pairs.
    """

    base: float
    ours: float
    ratio: float
    steps: dict[tuple[str, str], float]

    def step(self, name: str) -> float:
        return sum(self.steps[name, direction] for direction in DIRECTIONS)


def plain_twin(layer: FastDeconv | Delinear) -> nn.Module:
    """What stands in the layer's place elsewhere: convolution and BatchNorm, or a linear layer."""
    if isinstance(layer, Delinear):
        return nn.Linear(layer.in_features, layer.out_features)
    how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    how |= {"groups": layer.groups, "bias": False}
    convolution = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, **how)
    return nn.Sequential(convolution, nn.BatchNorm2d(layer.out_channels))


def time_layer(
    layer: FastDeconv | Delinear,
    shape: tuple[int, ...],
    compute: Compute,
    *,
    rounds: int,
    warmup: int,
) -> Times:
    """Times of a layer that is given random numbers of `shape` and asked for their gradient too."""
    if len(shape) != 4:
        compute = Compute(compute.device)  # rows have no pixels to lie in order
    x = torch.randn(shape).to(compute.device, memory_format=compute.memory_format)
    pair = [_make_call(compute.place(one), x) for one in (plain_twin(layer), deepcopy(layer))]
    how = {"rounds": rounds, "warmup": warmup}
    figures = benchmark.summarise(
        *benchmark.time_in_turn(*pair, **how, device=compute.device),
    )
    read = profile_layer.measure(deepcopy(layer), x, compute, **how)
    steps = {
        (step, way): profile_layer.find(read, step=step, direction=way) / 1000
        for step in STEPS
        for way in DIRECTIONS
    }
    return Times(figures["base_seconds"], figures["deconv_seconds"], figures["ratio"], steps)


def _make_call(module: nn.Module, x: Tensor) -> Callable[[], None]:
    x = x.detach().requires_grad_()
    grad = torch.randn_like(module(x))

    def call() -> None:
        module.zero_grad()
        x.grad = None
        module(x).backward(grad)

    return call


def measure_peak(device: torch.device, side: int | None = None) -> float:
    """Flops a second of the best of several float32 products of square matrices."""
    side = PEAK_SIDES[device.type] if side is None else side
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    times = [benchmark.time_call(lambda: left @ right, device) for _ in range(PEAK_ROUNDS)]
    return 2 * side**3 / min(times)
