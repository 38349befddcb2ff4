"""Record the loss curves of the golden tests: 20 steps of every network with every kind of layers.

    python scripts/dev/record_golden.py                 record tests/golden/ARCH.txt of all networks
    python scripts/dev/record_golden.py vgg11 mlp       record these networks

Record again after an intended change of numerics; `tests/integration/test_golden.py` compares.

The batches are small and hold the embedded digits with noise, because flat borders lie on the kinks
of ReLU. Training is in float64, because deep networks amplify rounding errors in every step. The
learning rate of a curve is the highest power of ten, up to 0.001, that keeps the effect of rounding
small. Settings here do not follow changes of defaults.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from models import (
    ARCHITECTURES,
    IMAGENET_ARCHITECTURES,
    build_imagenet_model,
    build_model,
    make_layers,
)
from util.cli.parser import Parser
from util.console import print_line
from util.data.datasets import DATASETS
from util.files import atomic_write
from util.training.accelerator import Accelerator
from util.training.optim import build_criterion, build_optimizer, group_parameters

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "golden"
STEPS, BATCH, CLASSES = 20, 4, 10
NOISE = 0.5  # standard deviations of the digits
ROUNDING = 1e-15  # relative perturbation of every pixel
STEADY = 1e-10  # relative tolerance of a loss under this perturbation
LAYERS = {
    "block": 16,
    "block_final": 32,
    "eps": 0.1,
    "n_iter": 5,
    "sampling_stride": 3,
    "root": "cholesky",
    "root_final": "newton",
    "rows_per_feature": 32,
    "layout": "interleaved",
    "shared": True,
}
MODES = {f"mode{mode}": {"deconv": True, "mode": mode, **LAYERS} for mode in range(1, 6)}
KINDS = {"bn": {"deconv": False}, **MODES}
METHODS = {  # for networks with methods in place of modes
    f"method{number}": {"deconv": number > 1, **LAYERS, "block_final": None}
    for number in range(1, 5)
}
# Optimizers other than SGD, by column of the network SMALL.
SMALL, OPTIMIZERS = "simple_v2", {"adamw": "AdamW", "muon": "Muon"}


class Curve(NamedTuple):
    """Learning rate, and the loss before each step."""

    rate: float
    losses: list[float]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("record_golden.py", __doc__.splitlines()[0])
    add, known = parser.add_group("networks"), list_networks()
    add("names", f"any of {', '.join(known)}", default_text="all", nargs="*", metavar="ARCH")
    names = parser.parse_args(argv).names
    for name in set(names) - set(known):
        parser.error(f"ARCH {name}: unknown; choose from {', '.join(known)}")
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for arch in names or known:
        write_curves(arch, {kind: record(arch, kind) for kind in kinds_of(arch)})
        print_line(f"{FOLDER / arch}.txt")


def list_networks() -> list[str]:
    """Return the name of every network of this project, aliases once."""
    ours = {name: table for name, table in IMAGENET_ARCHITECTURES.items() if table.init}
    return list({entry.build: name for name, entry in (ARCHITECTURES | ours).items()}.values())


def kinds_of(arch: str) -> dict[str, dict[str, Any]]:
    """Return the kinds of layers to record a network with, and their settings."""
    has_methods = arch in ARCHITECTURES and "method" in ARCHITECTURES[arch].options
    if arch == SMALL:
        return KINDS | dict.fromkeys(OPTIMIZERS, MODES["mode5"])
    return METHODS if has_methods else KINDS


def record(arch: str, kind: str) -> Curve:
    """Return the curve at the highest learning rate at which no loss depends on rounding."""
    rates = (10.0**-power for power in count(3))
    curves = (Curve(rate, steady_losses(arch, kind, rate)) for rate in rates)
    return next(curve for curve in curves if len(curve.losses) == STEPS)


def steady_losses(arch: str, kind: str, rate: float) -> list[float]:
    """Return the losses before the first that depends on rounding."""
    pairs = zip(losses(arch, kind, rate), losses(arch, kind, rate, noise=ROUNDING), strict=True)
    steady = takewhile(lambda pair: abs(pair[0] - pair[1]) <= STEADY * pair[0], pairs)
    return [loss for loss, _ in steady]


def losses(
    arch: str, kind: str, rate: float, steps: int = STEPS, noise: float = 0
) -> Iterator[float]:
    """Yield the loss before each training step, on the current number of threads."""
    model = build(arch, kind).double()
    criterion, accelerator = build_criterion("CE", CLASSES), Accelerator(torch.device("cpu"))
    name = OPTIMIZERS.get(kind, "SGD")
    groups = group_parameters(model, name)
    optimizer = build_optimizer(name, groups, lr=rate, weight_decay=5e-4)
    size, channels = (32, 1) if arch in ARCHITECTURES else (64, 3)
    images, targets = load_images(size, channels, noise)
    for first in range(0, BATCH * steps, BATCH):
        batch = slice(first, first + BATCH)
        loss = criterion(model(images[batch]), targets[batch])
        accelerator.update(loss, optimizer)
        yield loss.item()


def build(arch: str, kind: str) -> nn.Module:
    """Build the network with reproducible weights and without dropout."""
    torch.manual_seed(0)
    layers = make_layers(**kinds_of(arch)[kind])
    if arch in ARCHITECTURES:
        method = {"method": int(kind[-1])} if kind in METHODS else {}
        return build_model(arch, layers, in_channels=1, num_classes=CLASSES, **method)
    plain = {"dropout_rate": 0.0} if "dropout_rate" in IMAGENET_ARCHITECTURES[arch].options else {}
    return build_imagenet_model(arch, layers, num_classes=CLASSES, **plain)


@cache
def load_images(size: int, channels: int, perturbation: float) -> tuple[Tensor, Tensor]:
    """Return the first handwritten digits, normalized, with noise, and their classes."""
    spec, train, _ = DATASETS["digits"].load("digits", size)
    digits = train.source.images[: BATCH * STEPS].double() / 255
    digits = ((digits - spec.mean[0]) / spec.std[0]).expand(-1, channels, -1, -1)
    noise = torch.Generator().manual_seed(0)
    for scale in (NOISE, perturbation * digits):
        digits = digits + scale * torch.randn(digits.shape, generator=noise, dtype=digits.dtype)
    return digits, train.targets[: BATCH * STEPS]


def write_curves(arch: str, curves: Mapping[str, Curve]) -> None:
    """Write a text table with a column per kind and a row per step."""
    rows = [
        f"{'step':>4} {' '.join(f'{kind:>11}' for kind in curves)}",
        f"rate {' '.join(f'{curve.rate:11.0e}' for curve in curves.values())}",
    ]
    steps = zip(*(curve.losses for curve in curves.values()), strict=True)
    for step, values in enumerate(steps, start=1):
        rows.append(f"{step:4} {' '.join(f'{value:11.8f}' for value in values)}")
    with atomic_write(FOLDER / f"{arch}.txt") as file:
        file.write("".join(f"{row}\n" for row in rows).encode())


def read_curves(arch: str) -> dict[str, Curve]:
    """Read the table of `write_curves`.

    Raises:
        FileNotFoundError: the network has not been recorded.
    """
    kinds, *rows = (line.split()[1:] for line in (FOLDER / f"{arch}.txt").read_text().splitlines())
    columns = zip(*([float(value) for value in row] for row in rows), strict=True)
    pairs = zip(kinds, columns, strict=True)
    return {kind: Curve(rate, losses) for kind, (rate, *losses) in pairs}


if __name__ == "__main__":
    main()
