"""Time the four steps of deconvolution and the convolution, as a Markdown table.

    python scripts/bench/layers.py --arch vgg11 resnet18 --batch-size 64
    python scripts/bench/layers.py --arch vgg11 --mode 4 --by-layer

Times are medians over rounds of forward and backward, without loss and optimizer. torch.profiler
takes the time of every operation; on a GPU, of its kernels. A backward operation belongs to the
step of its forward operation. The rest of a layer's time counts as convolution.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from deconv import Delinear, FastDeconv, whitening
from deconv.ops import covariance
from scripts.bench import steps
from scripts.paper.tables import format_table
from util.cli.parser import Parser
from util.training.accelerator import Accelerator

PATCHES, STATISTICS = "patches", "mean and covariance"
FUNCTIONS = {  # that the layers call, by module and name
    (whitening, "mean_and_covariance"): STATISTICS,
    (whitening, "centre_rows"): STATISTICS,
    (whitening, "inverse_sqrt"): "root",
    (whitening, "fold"): "fold",
    (covariance, "gather_centred"): PATCHES,  # inside the second step, forward and backward
    (covariance, "scatter"): PATCHES,
    (covariance, "select_pixels"): PATCHES,
}
CONVOLUTION, REST = "convolution", "rest"
STEPS = (PATCHES, STATISTICS, "root", "fold", CONVOLUTION)
DIRECTIONS = ("forward", "backward")
LAYER, NODE = "layer: ", "autograd::engine::evaluate_function"  # beginnings of names of events

Key = tuple[str, str, str]  # layer (beginning with LAYER, or ""), step, direction


def main(argv: Sequence[str] | None = None) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler logs every start
    parser = make_parser()
    flags = parser.parse_args(argv)
    device = steps.find_device(parser, flags)
    cases = steps.list_cases(parser, flags, steps.OURS)
    print(", ".join(steps.describe_environment(device).values()))
    for case in cases:
        rounds = measure(case, flags, device)
        table = format_layers(rounds) if flags.by_layer else format_steps(rounds)
        title = ", ".join(f"{name} {value}" for name, value in asdict(case).items())
        print(f"\n{title}\n\n{table}", end="")


def make_parser() -> Parser:
    parser = Parser("layers.py", __doc__.splitlines()[0])
    steps.add_case_flags(parser)
    steps.add_machine_flags(parser)
    add = parser.add_group("table")
    add("--by-layer", "a row for each layer", action="store_true")
    return parser


def measure(
    case: steps.Case, flags: argparse.Namespace, device: torch.device
) -> list[Counter[Key]]:
    """Return the milliseconds of each round by layer, step and direction."""
    torch.manual_seed(0)
    amp, channels_last = steps.AMP[case.dtype], flags.channels_last
    accelerator = Accelerator(device, amp=amp, channels_last=channels_last)
    model = accelerator.to_device(steps.build(case, steps.OURS, flags))
    shape = (case.batch_size, 3, flags.image_size, flags.image_size)
    images = torch.randn(shape).to(device, memory_format=accelerator.memory_format)
    readings = []
    with labelled(model):
        for _ in range(flags.warmup + flags.rounds):
            model.zero_grad()
            with profile() as profiler:
                with record_function("forward"), accelerator.autocast():
                    out = model(images)
                with record_function("backward"):
                    out.backward(torch.ones_like(out))
            readings.append(add_up(profiler.events()))
    return readings[flags.warmup :]


@contextmanager
def labelled(model: nn.Module) -> Iterator[None]:
    """Label the deconvolution layers of `model` and their steps for the profiler."""
    with ExitStack() as stack:
        for (module, name), step in FUNCTIONS.items():
            labelled_function = record_function(step)(getattr(module, name))
            stack.enter_context(patch.object(module, name, labelled_function))
        for name, layer in model.named_modules():
            if isinstance(layer, FastDeconv | Delinear):
                forward = record_function(f"{LAYER}{name}")(layer.forward)
                stack.enter_context(patch.object(layer, "forward", forward))
        yield


def add_up(events: Sequence[FunctionEvent]) -> Counter[Key]:
    """Add up the milliseconds of a round's events by layer, step and direction."""
    events = sorted(events, key=lambda event: event.time_range.start)
    on_gpu = any(event.device_type == DeviceType.CUDA for event in events)
    # A node has the sequence number of its forward operation, the last event with this number:
    # operations without a node have the number of the next.
    forward = [e for e in events if e.scope == 0 and not e.name.startswith(NODE)]
    makers = {e.sequence_nr: e for e in forward if e.sequence_nr >= 0}

    @cache
    def locate(event: FunctionEvent | None) -> Key:
        if event is None:
            return "", REST, "forward"
        layer, step, direction = locate(event.cpu_parent)
        if event.name in STEPS:
            step = event.name
        elif event.name in DIRECTIONS:
            direction = event.name
        elif event.name.startswith(LAYER):
            layer, step = event.name, CONVOLUTION
        elif event.name.startswith(NODE):
            layer, step, direction = *locate(makers.get(event.sequence_nr))[:2], "backward"
        return layer, step, direction

    parts: Counter[Key] = Counter()
    for event in events:
        if event.device_type == DeviceType.CPU:
            time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            parts[locate(event)] += time / 1000
    return parts


def format_steps(rounds: Sequence[Counter[Key]]) -> str:
    """Format a row for each step, over all layers."""
    seen = set().union(*rounds[0])
    names = {step: [step] for step in (*STEPS, REST) if step in seen} | {"whole": []}
    rows = [[title, *format_times(rounds, DIRECTIONS, *names[title])] for title in names]
    return format_table(["step", *(f"{way} (ms)" for way in DIRECTIONS), "share"], rows)


def format_layers(rounds: Sequence[Counter[Key]]) -> str:
    """Format a row for each layer: its steps, forward and backward together."""
    parts = (*STEPS, *DIRECTIONS)
    layers = dict.fromkeys(layer for layer, step, _ in rounds[0] if step != REST)
    rows = [[name.removeprefix(LAYER), *format_times(rounds, parts, name)] for name in layers]
    return format_table(["layer", *(f"{part} (ms)" for part in parts), "share"], rows)


def format_times(rounds: Sequence[Counter[Key]], parts: Sequence[str], *names: str) -> list[str]:
    """Format the time of each part of a row, and the row's share of the whole."""
    times = [f"{find(rounds, *names, part):.2f}" for part in parts]
    return [*times, f"{100 * find(rounds, *names) / find(rounds):.0f} %"]


def find(rounds: Sequence[Counter[Key]], *names: str) -> float:
    """Return the median milliseconds of all keys that hold the names."""
    return median(sum(v for key, v in r.items() if set(names) <= set(key)) for r in rounds)


if __name__ == "__main__":
    main()
