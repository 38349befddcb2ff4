"""Count the GPU kernels that training steps launch, without a GPU; print a Markdown table.

    python scripts/bench/launches.py                                  VGG-11, mode 5, blocks of 16
    python scripts/bench/launches.py --arch vgg11 resnet18 --mode 5 3
    python scripts/bench/launches.py --by-layer --option root=newton

Networks run on the meta device in float32, without loss and optimizer. Each operator counts as the
number of kernels that it launches; views and allocations count 0. A call of a library, such as the
Cholesky factor of cuSOLVER, counts 1. Rows of --by-layer include the gradient of the layer's input.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import astuple
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from deconv import Delinear, FastDeconv, group_statistics
from scripts.bench import steps
from scripts.paper.tables import KINDS, format_table
from util.cli.parser import Parser

aten = torch.ops.aten

# Operators besides views that launch no kernel.
NO_KERNEL = {aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}
NO_KERNEL |= {aten.promote_types}
# Fill and copy; fill and diagonal; copy and product (in aten/src/ATen/native: PadNd.cpp,
# cuda/TensorFactories.cu, cuda/Blas.cpp).
TWO_KERNELS = {aten.constant_pad_nd, aten.eye, aten.baddbmm}
# Columns of the tables.
CASE, WAYS = ("network", "mode", "block", "batch size"), ("forward", "backward")
PAIRS = [f"{title}, {way}" for title in KINDS.values() for way in WAYS]


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    flags = parser.parse_args(argv)
    cases = steps.list_cases(parser, flags, *KINDS)
    count = count_layers if flags.by_layer else count_networks
    columns = ["layer", *WAYS] if flags.by_layer else PAIRS
    rows = [[*astuple(case)[:-1], *row] for case in cases for row in count(case, flags)]
    print(format_table([*CASE, *columns], rows), end="")


def make_parser() -> Parser:
    parser = Parser("launches.py", __doc__.splitlines()[0])
    steps.add_case_flags(parser)
    parser.set_defaults(dtype=["float32"])
    add = parser.add_group("table")
    add("--by-layer", "print one row per deconvolution layer", action="store_true")
    return parser


def count_networks(case: steps.Case, flags: Namespace) -> Iterator[list[int]]:
    """Yield one row: launches of the network with BatchNorm, then with deconvolution."""
    networks, shape = [steps.build(case, kind, flags) for kind in KINDS], image_shape(case, flags)
    yield [*chain(*(count_launches(network, shape, input_grad=False) for network in networks))]


def count_layers(case: steps.Case, flags: Namespace) -> Iterator[list[str | int]]:
    """Yield one row per deconvolution layer, in the order of the forward."""
    network = steps.build(case, steps.OURS, flags).to("meta")
    inputs: dict[nn.Module, tuple[int, ...]] = {}

    def keep_shape(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if isinstance(layer, FastDeconv | Delinear):
            inputs[layer] = args[0].shape

    with torch.no_grad(), register_module_forward_pre_hook(keep_shape):
        network(torch.empty(image_shape(case, flags), device="meta"))
    names = {layer: name for name, layer in network.named_modules()}
    for layer, shape in inputs.items():
        yield [names[layer], *count_launches(layer, shape)]


def image_shape(case: steps.Case, flags: Namespace) -> tuple[int, ...]:
    """Return the shape of a batch of images."""
    return case.batch_size, 3, flags.image_size, flags.image_size


def kernels(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """Return the number of kernels that a call of an operator launches."""
    operator = func.overloadpacket
    if func.is_view or operator in NO_KERNEL:
        return 0
    if operator is aten.convolution:  # cuDNN adds the bias in a second kernel
        return 1 if args[2] is None else 2
    if operator is aten.addmm:  # cuBLASLt adds a vector to a product of matrices within the product
        sizes = *args[1].shape, *args[2].shape
        return 1 if args[0].dim() == 1 and 1 not in sizes else 2
    if operator is aten.convolution_backward:  # one kernel per gradient
        return sum(tensor is not None for tensor in result)
    return 2 if operator in TWO_KERNELS else 1


class Launches(TorchDispatchMode):
    """Dispatch mode that counts kernel launches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += kernels(func, args, result)
        return result


def count_launches(
    layer: nn.Module, shape: tuple[int, ...], *, input_grad: bool = True
) -> tuple[int, int]:
    """Count the kernel launches of a training forward and its backward, on the meta device."""
    layer = deepcopy(layer).to("meta").train()
    x = torch.empty(shape, device="meta", requires_grad=input_grad)
    for _ in range(2):  # the first step fills caches that later steps reuse
        with Launches() as forward, group_statistics():
            out = layer(x)
        grad = torch.empty_like(out)
        with Launches() as backward:
            out.backward(grad)
        layer.zero_grad()
        x.grad = None
    return forward.count, backward.count


if __name__ == "__main__":
    main()
