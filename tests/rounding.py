"""Emulate the reduced float32 precision of GPUs on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
FACTORS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.mv.default: (0, 1),
    aten.dot.default: (0, 1),
    aten.linalg_solve_triangular.default: (0, 1),
    aten.convolution.default: (0, 1),
    aten.convolution_backward.default: (0, 1, 2),
}


class Rounding(TorchDispatchMode):
    """Round the factors of every float32 product, as far as torch's settings allow at the call.

    Products obey the setting of CUDA: 10 mantissa bits for "tf32", as its tensor cores, or that of
    oneDNN: 7 for "bf16". Convolutions obey that of oneDNN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rounded = 0  # products

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = list(args)
        precision = find_precision("convolution" in str(func)) if func in FACTORS else None
        for i in FACTORS[func] if precision else ():
            if given[i].dtype == torch.float32:
                given[i] = round_mantissa(given[i], precision)
                self.rounded += 1
        return func(*given, **(kwargs or {}))


def find_precision(convolves: bool) -> str | None:
    """Return the lowest precision that the settings allow: "tf32", "bf16" or None for all bits."""
    backends: Any = torch.backends
    settings = [backends.mkldnn.conv] if convolves else [backends.mkldnn.matmul]
    settings += [] if convolves else [backends.cuda.matmul]
    values = {setting.fp32_precision for setting in settings}
    return next((name for name in ("bf16", "tf32") if name in values), None)


def round_mantissa(x: Tensor, precision: str) -> Tensor:
    """Round float32 numbers to the 10 mantissa bits of TF32, or the 7 of bfloat16."""
    dropped = {"tf32": 13, "bf16": 16}[precision]
    bits = x.view(torch.int32) + (1 << (dropped - 1))
    return (bits >> dropped << dropped).view(torch.float32)
