"""Time the four steps of deconvolution and the convolution, as a Markdown table.

    python scripts/bench/layers.py --layer 64,128,32                    channels in, out, side
    python scripts/bench/layers.py --layer 3,64,224,7,2 --mode 4        kernel and stride as well
    python scripts/bench/layers.py --arch vgg11 --batch-size 128 --by-layer

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
from functools import cache
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from deconv import Delinear, FastDeconv, whitening
from deconv.ops import covariance
from scripts.bench import steps
from util.cli.parser import Parser, bounded_int
from util.training.accelerator import Accelerator

PATCHES, STATISTICS = "patches", "mean and covariance"
FUNCTIONS = {  # that the layers call, by module and name
    (whitening, "mean_and_covariance"): STATISTICS,
    (whitening, "centre_rows"): STATISTICS,
    (whitening, "inverse_sqrt"): "root",
    (whitening, "fold"): "fold",
    (covariance, "gather"): PATCHES,  # inside the second step, forward and backward
    (covariance, "scatter"): PATCHES,
    (covariance, "select_pixels"): PATCHES,
}
CONVOLUTION, REST = "convolution", "rest"
STEPS = (PATCHES, STATISTICS, "root", "fold", CONVOLUTION)
DIRECTIONS = ("forward", "backward")
LAYER, NODE = "layer: ", "autograd::engine::evaluate_function"  # beginnings of names of events
ARCH = "vgg11"

Key = tuple[str, str, str]  # layer, step, direction


def main(argv: Sequence[str] | None = None) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler logs every start
    parser = make_parser()
    flags = parser.parse_args(argv)
    if flags.layer and (flags.arch or flags.by_layer):
        parser.error(f"--layer: {'--arch' if flags.arch else '--by-layer'} needs a whole network")
    device = steps.find_device(parser, flags)
    torch.manual_seed(0)
    try:
        model, images = build(flags)
    except (TypeError, ValueError) as error:
        parser.error(f"{steps.describe_options(flags)}{error}")
    accelerator = Accelerator(device, amp=steps.AMP[flags.dtype], channels_last=flags.channels_last)
    rounds = measure(model, images, accelerator, rounds=flags.rounds, warmup=flags.warmup)
    print(f"{', '.join(steps.describe_environment(device).values())}\n")
    print(format_layers(rounds) if flags.by_layer else format_steps(rounds))


def make_parser() -> Parser:
    parser = Parser("layers.py", __doc__.splitlines()[0])
    add = parser.add_group("case")
    add("--layer", "one layer", layer_shape, metavar="C,OUT,SIDE[,KERNEL[,STRIDE]]")
    add("--arch", "a network", None, None, ARCH, metavar="NAME")
    add("--by-layer", "a row for each layer", action="store_true")
    add("--batch-size", "images", bounded_int(1), 128, metavar="N")
    add("--mode", "of the deconvolution", bounded_int(1, 5), 5, metavar="M")
    add("--block", "channels whitened together", bounded_int(1), 16, metavar="B")
    add("--dtype", "bf16 is autocast", None, "float32", choices=tuple(steps.AMP))
    steps.add_layer_flags(parser)
    steps.add_run_flags(parser)
    return parser


def layer_shape(text: str) -> tuple[int, ...]:
    """Parse C,OUT,SIDE[,KERNEL[,STRIDE]]; the defaults are kernel 3 and stride 1."""
    words = text.split(",")
    if not 3 <= len(words) <= 5 or not all(word.isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(
            f"expected C,OUT,SIDE[,KERNEL[,STRIDE]], whole numbers from 1, got {text!r}"
        )
    return (*map(int, words), *(3, 1)[len(words) - 3 :])


def build(flags: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """Build the layer or network and its input; a layer's input requires a gradient.

    Raises:
        ValueError, TypeError: as `steps.build`.
    """
    if flags.layer is None:
        case = steps.Case(
            flags.arch or ARCH, flags.mode, flags.block, flags.batch_size, flags.dtype
        )
        shape = (flags.in_channels, flags.image_size, flags.image_size)
        return steps.build(case, steps.OURS, flags), torch.randn(flags.batch_size, *shape)
    channels, out, side, kernel, stride = flags.layer
    options = {"mode": flags.mode, "block": flags.block, "eps": flags.eps, **dict(flags.option)}
    layer = FastDeconv(channels, out, kernel, stride, padding=kernel // 2, **options)
    return layer, torch.randn(flags.batch_size, channels, side, side, requires_grad=True)


def measure(
    model: nn.Module, images: Tensor, accelerator: Accelerator, *, rounds: int, warmup: int
) -> list[Counter[Key]]:
    """Return the milliseconds of each round by layer, step and direction."""
    model = accelerator.to_device(model)
    images = images.detach().to(accelerator.device, memory_format=accelerator.memory_format)
    images.requires_grad_(isinstance(model, FastDeconv | Delinear))
    readings = []
    with labelled(model):
        for _ in range(warmup + rounds):
            model.zero_grad()
            images.grad = None
            with profile() as profiler:
                with record_function("forward"), accelerator.autocast():
                    out = model(images)
                with record_function("backward"):
                    out.backward(torch.ones_like(out))
            readings.append(add_up(profiler.events()))
    return readings[warmup:]


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
            layer, step = event.name.removeprefix(LAYER), CONVOLUTION
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
    seen = {step for round_ in rounds for _, step, _ in round_}
    rows = {step: step for step in (*STEPS, REST) if step in seen} | {"whole": None}
    lines = ["| step | forward (ms) | backward (ms) | share |", "|---|---:|---:|---:|"]
    for title, step in rows.items():
        cells = [f"{find(rounds, step=step, direction=way):.2f}" for way in DIRECTIONS]
        share = find(rounds, step=step) / find(rounds)
        lines.append(f"| {title} | {' | '.join(cells)} | {100 * share:.0f} % |")
    return "\n".join(lines)


def format_layers(rounds: Sequence[Counter[Key]]) -> str:
    """Format a row for each layer: its steps, forward and backward together."""
    titles = [f"{title} (ms)" for title in (*STEPS, *DIRECTIONS)]
    lines = [f"| layer | {' | '.join(titles)} | share |", f"|---|{'---:|' * (len(titles) + 1)}"]
    for layer in dict.fromkeys(layer for layer, step, _ in rounds[0] if step != REST):
        values = [find(rounds, layer=layer, step=step) for step in STEPS]
        values += [find(rounds, layer=layer, direction=way) for way in DIRECTIONS]
        share = find(rounds, layer=layer) / find(rounds)
        cells = " | ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {layer} | {cells} | {100 * share:.0f} % |")
    return "\n".join(lines)


def find(rounds: Sequence[Counter[Key]], **wanted: str | None) -> float:
    """Return the median milliseconds of the given `layer`, `step` and `direction`."""
    names = ("layer", "step", "direction")

    def fits(key: Key) -> bool:
        parts = zip(names, key, strict=True)
        return all(wanted.get(name) in (None, part) for name, part in parts)

    return median(sum(v for key, v in parts.items() if fits(key)) for parts in rounds)


if __name__ == "__main__":
    main()
