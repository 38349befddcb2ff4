"""Time the four steps of deconvolution and the convolution, as a Markdown table.

    python scripts/bench/layers.py --layer 64,128,32                    channels in, out, side
    python scripts/bench/layers.py --layer 3,64,224,7,2 --mode 4        kernel and stride as well
    python scripts/bench/layers.py --arch vgg11 --batch-size 128 --by-layer

Times are medians over rounds of forward and backward, without loss and optimizer. The forward of
a step is the time of its functions in `deconv.whitening`. The backward of a step runs from the last
gradient that arrives at their results to the last that leaves for their arguments. Patches are
gathered and scattered inside the second step; the table subtracts their time there. The rest of a
layer's time counts as convolution. On a GPU, CUDA events take the time, idle gaps included.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from deconv import Delinear, FastDeconv, whitening
from deconv.ops import covariance
from scripts.bench import steps
from util.cli.parser import Parser, bounded_int
from util.training.accelerator import Accelerator

# Functions of deconv.whitening, and their steps.
PATCHES, STATISTICS = "patches", "mean and covariance"
STEPS = {
    "mean_and_covariance": STATISTICS,
    "centre_rows": STATISTICS,
    "inverse_sqrt": "root",
    "fold": "fold",
}
# Functions of deconv.ops.covariance that sample patches inside the second step.
INSIDE, PARTS = "patches inside", ("gather", "scatter", "select_pixels")
NAMES = (PATCHES, *dict.fromkeys(STEPS.values()))
DIRECTIONS = ("forward", "backward")
ARCH = "vgg11"
LAYER, CONVOLUTION, REST, WHOLE = "layer", "convolution", "rest of the network", "whole"

Key = tuple[str, str, str]  # layer, step, direction


class Stopwatch:
    """A clock for the forward and backward of functions, by layer and step.

    Args:
        device: the device whose time is taken.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.layer, self.direction = "", "forward"
        self.spans: list[Span] = []
        self.backward_of: dict[str, Span] = {}

    def now(self) -> Any:
        """Return the time: seconds on a CPU, an event in the stream of a GPU."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def span(self, *key: str) -> Span:
        """Return a new span of time for (layer, step, direction)."""
        self.spans.append(Span(key, self.now))
        return self.spans[-1]

    def timed(
        self, function: Callable[..., Any], step: str, layer: str | None = None
    ) -> Callable[..., Any]:
        """Return a timed function; it begins `layer`, or belongs to the present layer."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            backward = self.span(self.layer if layer is None else layer, step, "backward")
            if layer is not None:
                self.layer, self.backward_of[layer] = layer, backward
            mark = lambda x: _Mark.apply(x, backward.stop)
            args, kwargs = change_tensors(mark, (args, kwargs))
            with self.span(self.layer, step, self.direction):
                result = function(*args, **kwargs)
            present = self.layer

            def begin(grad: Tensor) -> None:
                self.layer = present
                backward.start()

            def watch_gradient(x: Tensor) -> Tensor:
                x.register_hook(begin)
                return x

            return change_tensors(watch_gradient, result)

        return call

    def timed_inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a timed function that may run inside any step of a layer."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.span(self.layer, INSIDE, self.direction):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Time the deconvolution layers of `model`, and their steps while the context is open."""
        for name, layer in model.named_modules():
            if isinstance(layer, FastDeconv | Delinear):
                layer.forward = self.timed(layer.forward, LAYER, name)
                for parameter in layer.parameters():  # a first layer has no other end
                    stop = lambda _, name=name: self.backward_of[name].stop()
                    parameter.register_post_accumulate_grad_hook(stop)
        with ExitStack() as stack:
            for name, step in STEPS.items():
                timed = self.timed(getattr(whitening, name), step)
                stack.enter_context(patch.object(whitening, name, timed))
            for name in PARTS:
                timed = self.timed_inside(getattr(covariance, name))
                stack.enter_context(patch.object(covariance, name, timed))
            yield

    def read(self) -> Counter[Key]:
        """Return the seconds by layer, step and direction since the last reading."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: Counter[Key] = Counter()
        for span in self.spans:
            seconds[span.key] += span.seconds()
        self.spans.clear()
        return seconds


class Span:
    """A span of time from the last start to the last stop; as a context, of its block."""

    def __init__(self, key: Key, now: Callable[[], Any]) -> None:
        self.key, self.now = key, now
        self.begin = self.end = None

    def start(self) -> None:
        self.begin = self.now()

    def stop(self) -> None:
        self.end = self.now()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def seconds(self) -> float:
        """Return the seconds, 0 for a span that was not started or not stopped."""
        if self.begin is None or self.end is None:
            return 0.0
        if isinstance(self.begin, float):
            return self.end - self.begin
        return self.begin.elapsed_time(self.end) / 1000


class _Mark(torch.autograd.Function):
    """The identity; the backward calls `note` when a gradient leaves."""

    @staticmethod
    def forward(ctx, x: Tensor, note: Callable[[], None]) -> Tensor:
        ctx.note = note
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.note()
        return grad, None


def change_tensors(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply `change` to every tensor with a gradient in tuples, lists and dicts."""
    differs = lambda x: isinstance(x, Tensor) and x.requires_grad
    return tree_map(lambda x: change(x) if differs(x) else x, tree)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    flags = parser.parse_args(argv)
    if flags.layer and (flags.arch or flags.by_layer):
        parser.error(f"--layer: {'--arch' if flags.arch else '--by-layer'} needs a whole network")
    device = steps.find_device(parser, flags)
    torch.manual_seed(0)
    try:
        model, images = build(flags)
    except (TypeError, ValueError) as error:
        options = "".join(f"--option {name}={value}: " for name, value in flags.option)
        parser.error(f"{options}{error}")
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
    """Return the seconds of each round by layer, step and direction.

    The four steps and CONVOLUTION add up to the layer. All layers and REST add up to WHOLE, which
    has the layer name "".
    """
    model = accelerator.to_device(model)
    images = images.detach().to(accelerator.device, memory_format=accelerator.memory_format)
    images.requires_grad_(isinstance(model, FastDeconv | Delinear))
    watch = Stopwatch(accelerator.device)
    with watch.attached(model):
        readings = [_run_once(model, images, accelerator, watch) for _ in range(warmup + rounds)]
    return [divide(seconds) for seconds in readings[warmup:]]


def _run_once(
    model: nn.Module, images: Tensor, accelerator: Accelerator, watch: Stopwatch
) -> Counter[Key]:
    model.zero_grad()
    images.grad, watch.direction = None, "forward"
    with watch.span("", WHOLE, "forward"), accelerator.autocast():
        out = model(images)
    grad, watch.direction = torch.randn_like(out), "backward"
    with watch.span("", WHOLE, "backward"):
        out.backward(grad)
    return watch.read()


def divide(seconds: Counter[Key]) -> Counter[Key]:
    """Replace the time of whole layers by CONVOLUTION and REST."""
    parts: Counter[Key] = Counter()
    for (layer, step, direction), value in seconds.items():
        if step == WHOLE:
            parts[layer, WHOLE, direction] += value
            parts[layer, REST, direction] += value
        elif step == LAYER:
            parts[layer, CONVOLUTION, direction] += value
            parts["", REST, direction] -= value
        elif step == INSIDE:
            parts[layer, PATCHES, direction] += value
            parts[layer, STATISTICS, direction] -= value
        else:
            parts[layer, step, direction] += value
            parts[layer, CONVOLUTION, direction] -= value
    return parts


def format_steps(rounds: Sequence[Counter[Key]]) -> str:
    """Format a row for each step, over all layers."""
    several = any(layer for round_ in rounds for layer, _, _ in round_)
    lines = ["| step | forward (ms) | backward (ms) | share |", "|---|---:|---:|---:|"]
    for step in (*NAMES, CONVOLUTION, *([REST] if several else []), WHOLE):
        cells = [f"{find(rounds, step=step, direction=way):.2f}" for way in DIRECTIONS]
        share = find(rounds, step=step) / find(rounds, step=WHOLE)
        lines.append(f"| {step} | {' | '.join(cells)} | {100 * share:.0f} % |")
    return "\n".join(lines)


def format_layers(rounds: Sequence[Counter[Key]]) -> str:
    """Format a row for each layer: its steps, forward and backward together."""
    steps = (*NAMES, CONVOLUTION)
    titles = [f"{title} (ms)" for title in (*steps, *DIRECTIONS)]
    lines = [f"| layer | {' | '.join(titles)} | share |", f"|---|{'---:|' * (len(titles) + 1)}"]
    for layer in dict.fromkeys(layer for layer, _, _ in rounds[0] if layer):
        values = [find(rounds, layer=layer, step=step) for step in steps]
        values += [find(rounds, layer=layer, direction=way) for way in DIRECTIONS]
        share = find(rounds, layer=layer) / find(rounds, step=WHOLE)
        cells = " | ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {layer} | {cells} | {100 * share:.0f} % |")
    return "\n".join(lines)


def find(
    rounds: Sequence[Counter[Key]],
    *,
    layer: str | None = None,
    step: str | None = None,
    direction: str | None = None,
) -> float:
    """Return the median milliseconds of this layer, step and direction; None selects all."""
    asked = (layer, step, direction)

    def fits(key: Key) -> bool:
        return all(want in (None, part) for want, part in zip(asked, key, strict=True))

    return 1000 * median(sum(v for key, v in parts.items() if fits(key)) for parts in rounds)


if __name__ == "__main__":
    main()
