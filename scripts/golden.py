"""Loss curves of 20 steps of every network with every kind of layer, kept to be compared with.

    python scripts/golden.py                 record tests/golden/ARCH.txt of all networks
    python scripts/golden.py vgg11 mlp       of these

Recorded anew where what is computed was meant to change; `tests/test_golden.py` compares. Small
batches of the embedded digits. In float64, because deep networks that whiten multiply what rounding
does by 10^5 within the 20 steps. What is set here does not follow defaults.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import ARCHITECTURES, build_model, make_layers
from util.checkpoint import atomic_write
from util.compute import Compute
from util.console import say
from util.optim import build_criterion, build_optimizer
from util.parser import Parser
from util.standard_sets import load_digits

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "golden"
STEPS, BATCH, CLASSES, IMAGE_SIZE = 20, 4, 10, 32
# Learning rates. These, whose last layers see few vectors of many channels, multiply roundings at
# .001 by up to ten in every step.
RATE = 1e-3
RATES = {"vgg16": 1e-5, "vgg19": 1e-6, "resnet34": 1e-5}
LAYERS = {
    "block": 16,
    "block_final": 32,
    "eps": 1e-2,
    "n_iter": 5,
    "sampling_stride": 3,
    "root": "cholesky",
    "rows_per_feature": 32,
    "layout": "interleaved",
    "shared": True,
}
MODES = {f"mode{mode}": {"deconv": True, "mode": mode, **LAYERS} for mode in range(1, 6)}
KINDS = {"bn": {"deconv": False}, **MODES}
METHODS = {  # of the networks that have them in place of modes
    f"method{number}": {"deconv": number > 1, **LAYERS, "block_final": None}
    for number in range(1, 5)
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("golden.py", __doc__.splitlines()[0])
    add, known = parser.add_group("what to record"), list_networks()
    add("names", f"of {', '.join(known)}", shown="all", nargs="*", metavar="ARCH")
    names = parser.parse_args(argv).names
    for name in set(names) - set(known):
        parser.error(f"ARCH {name}: unknown; choose from {', '.join(known)}")
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for arch in names or known:
        write_curves(arch, {kind: list(losses(arch, kind)) for kind in kinds_of(arch)})
        say(f"{FOLDER / arch}.txt")


def list_networks() -> list[str]:
    """All networks, each once where several names stand for one."""
    return list({table.build: name for name, table in ARCHITECTURES.items()}.values())


def kinds_of(arch: str) -> dict[str, dict[str, Any]]:
    """The kinds of layers that a network is recorded with, and their settings."""
    return METHODS if "method" in ARCHITECTURES[arch].options else KINDS


def losses(arch: str, kind: str, steps: int = STEPS) -> Iterator[float]:
    """The loss before each of some steps of training, on as many threads as PyTorch uses now."""
    torch.manual_seed(0)
    layers = make_layers(**kinds_of(arch)[kind])
    method = {"method": int(kind[-1])} if kind in METHODS else {}
    model = build_model(arch, layers, in_channels=1, image_size=IMAGE_SIZE, **method).double()
    criterion, compute = build_criterion("CE", CLASSES), Compute(torch.device("cpu"))
    lr = RATES.get(arch, RATE)
    optimizer = build_optimizer("SGD", model.parameters(), lr=lr, weight_decay=5e-4)
    images, targets = pictures()
    for first in range(0, BATCH * steps, BATCH):
        batch = slice(first, first + BATCH)
        loss = criterion(model(images[batch]), targets[batch])
        compute.update(loss, optimizer)
        yield loss.item()


@cache
def pictures() -> tuple[Tensor, Tensor]:
    """The first handwritten digits, normalised, and what they are."""
    spec, train, _ = load_digits(IMAGE_SIZE)
    images = train.source.images[: BATCH * STEPS].double() / 255
    return (images - spec.mean[0]) / spec.std[0], train.targets[: BATCH * STEPS]


def write_curves(arch: str, curves: Mapping[str, Sequence[float]]) -> None:
    """A column for each kind, a row for each step."""
    rows = [f"{'step':>4} {' '.join(f'{kind:>11}' for kind in curves)}"]
    for step, values in enumerate(zip(*curves.values(), strict=True), start=1):
        rows.append(f"{step:4} {' '.join(f'{value:11.8f}' for value in values)}")
    with atomic_write(FOLDER / f"{arch}.txt") as file:
        file.write("".join(f"{row}\n" for row in rows).encode())


def read_curves(arch: str) -> dict[str, list[float]]:
    """What `write_curves` wrote.

    Raises:
        FileNotFoundError: the network has not been recorded.
    """
    head, *rows = (line.split() for line in (FOLDER / f"{arch}.txt").read_text().splitlines())
    columns = zip(*rows, strict=True)
    return {kind: list(map(float, values)) for kind, values in zip(head, columns, strict=True)}


if __name__ == "__main__":
    main()
