"""Time whole training steps against the same network with BatchNorm; print a Markdown table.

    python scripts/bench/steps.py                                  VGG-11, mode 5, blocks of 16
    python scripts/bench/steps.py --arch vgg11 resnet18 --mode 5 3 --block 16 64 --json steps.json
    python scripts/bench/steps.py --option shared=False --against plain --device cpu --threads 2
    python scripts/bench/steps.py --against plain --fuse --rounds 2 --eval-rounds 81

A case is a network, mode, block, batch size and precision. The two networks of a case take steps in
turn in one process, in alternating order, so other work on the machine affects both alike. The
ratio is the median over the pairs of steps, with its quartiles in brackets.

- A training step is zero_grad, forward, loss, backward and SGD, on random images already on the
  device. Gradients are checked as in a run.
- `eval` is a forward in evaluation. With --fuse, `deconv.fuse` first folds the whitening into the
  convolutions, which then have biases like those of --against plain.
- --against unchecked compares deconvolution with itself without the check of the gradients.
- Memory is the peak of training steps in a fresh process: all tensors on a GPU; on a CPU the growth
  of the process since the imports (Linux only).
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from inspect import Parameter, signature
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from deconv import FastDeconv, fuse
from models import ARCHITECTURES, build_imagenet_model, build_model, make_layers, model_hooks
from util.cli.parser import Parser, bounded_float, bounded_int, str2bool
from util.device import choose_graphs, describe_device, read_processor
from util.errors import RunError
from util.files import atomic_write
from util.training.accelerator import Accelerator
from util.training.hooks import ModelHooks
from util.training.metrics import peak_memory_mb
from util.training.optim import build_criterion, build_optimizer

Step = Callable[[], None]

OURS, UNCHECKED = "deconv", "unchecked"
TITLES = {"bn": "BatchNorm", "plain": "plain", UNCHECKED: "deconv unchecked"}
AMP = {"float32": "off", "bf16": "bf16"}
MEMORY_STEPS = 3
# Keywords of FastDeconv that --option may set; the others have flags.
OPTIONS = [
    name
    for name, parameter in signature(FastDeconv).parameters.items()
    if parameter.kind is Parameter.KEYWORD_ONLY
    and name not in ("mode", "block", "eps", "device", "dtype")
]


@dataclass(frozen=True)
class Case:
    """A network and its training, named after flags."""

    arch: str
    mode: int
    block: int
    batch_size: int
    dtype: str


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all cases, print a row for each, and write them to the file of --json."""
    parser = make_parser()
    flags = parser.parse_args(argv)
    device = find_device(parser, flags)
    if flags.json and not flags.json.absolute().parent.is_dir():
        parser.error(f"--json {flags.json}: the folder does not exist")
    cases = list_cases(parser, flags, flags.against, OURS)
    environment = describe_environment(device)
    try:
        choose_graphs(flags.cuda_graphs, device, 1, flags.compile)  # fail before any measurement
        print(f"{', '.join(environment.values())}\n\n{format_head(flags)}", flush=True)
        rows = []
        for case in cases:
            kinds = {} if flags.no_memory else {"base": flags.against, OURS: OURS}
            memory = {name: ask_memory(case, kind, flags, device) for name, kind in kinds.items()}
            rows.append({**asdict(case), **measure_times(case, flags, device), "memory_mb": memory})
            print(format_row(rows[-1]), flush=True)
            if flags.json:
                content = {"environment": environment, "flags": vars(flags), "rows": rows}
                with atomic_write(flags.json) as file:
                    file.write(json.dumps(content, indent=2, default=str).encode() + b"\n")
    except RunError as error:  # the steps cannot be captured
        parser.error(str(error))


def make_parser() -> Parser:
    parser = Parser("steps.py", __doc__.splitlines()[0])
    add_case_flags(parser)
    add_machine_flags(parser)
    add = parser.add_group("measurement")
    text = "network to compare with"
    add("--against", text, None, "bn", choices=tuple(TITLES))
    add("--compile", "compile both networks", str2bool, False)
    text = "capture training steps as CUDA graphs"
    add("--cuda-graphs", text, str2bool, default_text="on a GPU without --compile")
    add("--fuse", "evaluate the fused network", str2bool, False)
    text = "measured evaluations per network"
    add("--eval-rounds", text, bounded_int(2), None, "as --rounds")
    add("--no-memory", "skip the measurement of memory", action="store_true")
    add("--json", "write all times to FILE", Path, metavar="FILE")
    return parser


def add_case_flags(parser: Parser) -> None:
    """Add the flags of networks, layers and images."""
    add = parser.add_group("cases (all combinations)")
    several: dict[str, Any] = {"nargs": "+"}
    add("--arch", "networks", None, ["vgg11"], "vgg11", metavar="NAME", **several)
    add("--batch-size", "images per step", bounded_int(1), [128], "128", **several)
    add("--mode", "modes of deconvolution", bounded_int(1, 5), [5], "5", metavar="M", **several)
    add("--block", "channels whitened together", bounded_int(1), [16], "16", metavar="B", **several)
    add = parser.add_group("layers and images")
    add("--block-fc", "features whitened together before the last layer", bounded_int(0), None, 512)
    add("--eps", "regularization, in units of variance", bounded_float(above=0), 1e-2)
    text = f"other keywords of FastDeconv: {', '.join(OPTIONS)}"
    add("--option", text, option, [], "", nargs="+", metavar="NAME=VALUE")
    add("--image-size", "side of the images in pixels", bounded_int(1), 32)
    add("--classes", "number of classes", bounded_int(1), 10)


def add_machine_flags(parser: Parser) -> None:
    """Add the flags of precision, machine and repetitions."""
    add = parser.add_group("machine and repetitions")
    several: dict[str, Any] = {"nargs": "+", "choices": tuple(AMP)}
    text = "precision; bf16 means autocast (all combinations)"
    add("--dtype", text, None, ["float32"], "float32", **several)
    add("--rounds", "measured training steps per network", bounded_int(2), 11)
    add("--warmup", "steps before the measurement", bounded_int(0), 3)
    add("--threads", "CPU threads of PyTorch", bounded_int(1, 1024))
    add("--device", "device", None, None, "a GPU if available", choices=("cpu", "cuda"))
    text = "channels_last memory format"
    add("--channels-last", text, str2bool, False)


def option(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE: a keyword of FastDeconv, and a Python literal or else a string."""
    name, equals, value = text.partition("=")
    if not equals or name not in OPTIONS:
        raise argparse.ArgumentTypeError(
            f"expected NAME=VALUE, NAME one of {', '.join(OPTIONS)}; got {text!r}"
        )
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def find_device(parser: Parser, flags: argparse.Namespace) -> torch.device:
    """Return the device of --device, by default a GPU if available; set the CPU threads."""
    has_gpu = torch.cuda.is_available()
    if flags.device == "cuda" and not has_gpu:
        parser.error("--device cuda: PyTorch finds no CUDA device")
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    return torch.device(flags.device or ("cuda" if has_gpu else "cpu"))


def list_cases(parser: Parser, flags: argparse.Namespace, *kinds: str) -> list[Case]:
    """Return all combinations; refuse a network that cannot have one of the kinds of layers."""
    cases = [Case(*values) for values in product(*(getattr(flags, f.name) for f in fields(Case)))]
    for case, kind in product(cases, kinds):
        try:
            with torch.device("meta"):
                build(case, kind, flags)
        except (TypeError, ValueError) as error:
            options = "".join(f"--option {name}={value}: " for name, value in flags.option)
            parser.error(f"--arch {case.arch}: {options}{error}")
    return cases


def build(case: Case, kind: str, flags: argparse.Namespace) -> nn.Module:
    """Build the network of a case with one kind of layers: deconv, unchecked, bn or plain.

    Raises:
        ValueError: the network is unknown, or does not take such layers.
        TypeError: an option has the wrong type.
    """
    ours = kind in (OURS, UNCHECKED)
    layers = make_layers(
        deconv=ours,
        batchnorm=kind == "bn",
        mode=case.mode,
        block=case.block,
        block_final=flags.block_fc if ours else None,
        eps=flags.eps,
        **dict(flags.option),
    )
    shape = {"num_classes": flags.classes, "image_size": flags.image_size}
    make = build_model if case.arch in ARCHITECTURES else build_imagenet_model
    return make(case.arch, layers, **shape)


def make_steps(
    case: Case, kind: str, flags: argparse.Namespace, device: torch.device
) -> tuple[Step, Callable[[], Step]]:
    """Return the training step, and a function that ends training and returns the evaluation."""
    torch.manual_seed(0)
    accelerator = Accelerator(
        device,
        amp=AMP[case.dtype],
        channels_last=flags.channels_last,
        compiled=flags.compile,
        cuda_graphs=choose_graphs(flags.cuda_graphs, device, 1, flags.compile),
    )
    model = accelerator.to_device(build(case, kind, flags))
    criterion = build_criterion("CE", flags.classes)
    rates = {"lr": 0.01, "weight_decay": 5e-4}
    fused = device.type == "cuda"  # as main.py does
    optimizer = build_optimizer("SGD", model.parameters(), **rates, fused=fused)
    images = torch.randn(case.batch_size, 3, flags.image_size, flags.image_size)
    targets = torch.randint(flags.classes, (case.batch_size,))
    images, targets = accelerator.batch_to_device(images, targets)
    network = accelerator.compile_for_training(model, images.shape, ModelHooks(**model_hooks()))

    def train() -> None:
        with accelerator.autocast():
            loss = criterion(network(images), targets)
        if kind == UNCHECKED:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        else:
            accelerator.update(loss, optimizer)

    def finish() -> Step:
        final = accelerator.compile(fuse(model.eval()) if flags.fuse else model.eval())

        @torch.no_grad()
        def evaluate() -> None:
            with accelerator.autocast():
                final(images)

        return evaluate

    return train, finish


def measure_times(
    case: Case, flags: argparse.Namespace, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Return the times of a case, summarized, under the keys `train` and `eval`."""
    steps = [make_steps(case, kind, flags, device) for kind in (flags.against, OURS)]
    trained = time_in_turn(*(train for train, _ in steps), flags.rounds, flags.warmup)
    rounds = flags.eval_rounds or flags.rounds
    evaluated = time_in_turn(*(finish() for _, finish in steps), rounds, flags.warmup)
    return {"train": summarize(*trained), "eval": summarize(*evaluated)}


def time_in_turn(
    base: Step, ours: Step, rounds: int, warmup: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of `rounds` pairs of calls, in alternating order, after a warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(warmup + rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            start = read_clock()
            (base, ours)[which]()
            times[which].append(read_clock() - start)
    return times[0][warmup:], times[1][warmup:]


def read_clock() -> float:
    """Return the time in seconds, once a GPU in use is idle."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def summarize(base: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Return medians in seconds, median and quartiles of the ratio ours / base, and all times."""
    ratios = [b / a for a, b in zip(base, ours, strict=True)]
    lower, ratio, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "base_seconds": statistics.median(base),
        "deconv_seconds": statistics.median(ours),
        "ratio": ratio,
        "quartiles": [lower, upper],
        "base_times": list(base),
        "deconv_times": list(ours),
    }


def ask_memory(
    case: Case, kind: str, flags: argparse.Namespace, device: torch.device
) -> float | None:
    """Run `measure_memory` in a fresh process."""
    threads = {"initializer": torch.set_num_threads, "initargs": (torch.get_num_threads(),)}
    with ProcessPoolExecutor(1, get_context("spawn"), **threads) as pool:
        return pool.submit(measure_memory, case, kind, flags, device).result()


def measure_memory(
    case: Case, kind: str, flags: argparse.Namespace, device: torch.device
) -> float | None:
    """Return the peak memory of training steps in MiB, None on an unsupported system."""
    before = read_resident("VmRSS")
    train, _ = make_steps(case, kind, flags, device)
    for _ in range(MEMORY_STEPS):
        train()
    if device.type == "cuda":
        return peak_memory_mb(device)
    after = read_resident("VmHWM")
    return None if before is None or after is None else after - before


def read_resident(name: str) -> float | None:
    """Return VmRSS, the resident memory of this process in MiB, or VmHWM, its peak.

    NOTE: ru_maxrss of getrusage starts at the peak of the parent process.
    """
    try:
        match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(match[1]) / 1024 if match else None


def describe_environment(device: torch.device) -> dict[str, str]:
    return {
        "processor": read_processor(),
        "device": describe_device(device),
        "torch": f"torch {torch.__version__}",
        "python": f"python {platform.python_version()}",
    }


def format_head(flags: argparse.Namespace) -> str:
    base, ours = TITLES[flags.against], {"eval (ms)": "fused"} if flags.fuse else {}
    units = ("(ms)", "eval (ms)", "(MiB)")
    pairs = [f"{base} {unit} | {ours.get(unit, OURS)} {unit}" for unit in units]
    titles = f"{pairs[0]} | ratio | {pairs[1]} | eval ratio | {pairs[2]}"
    rule = "|---|" + "---:|" * 3 + "---|" + "---:|" * 8
    return f"| network | mode | block | batch | precision | {titles} |\n{rule}"


def format_row(row: dict[str, Any]) -> str:
    cells = [row[name] for name in ("arch", "mode", "block", "batch_size", "dtype")]
    for part in (row["train"], row["eval"]):
        cells += [f"{1000 * part[f'{name}_seconds']:.1f}" for name in ("base", OURS)]
        cells.append("{:.2f} [{:.2f}, {:.2f}]".format(part["ratio"], *part["quartiles"]))
    memory = (row["memory_mb"].get(name) for name in ("base", OURS))
    cells += ["-" if value is None else f"{value:.0f}" for value in memory]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
