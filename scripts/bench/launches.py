"""Count the GPU kernels that a layer launches, without a GPU.

The layer runs on the meta device. Every operator that is not a view or an allocation counts;
operators that launch several kernels count as such. A call of a library, such as cuSOLVER's
Cholesky factor, counts as one.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Operators without a kernel that are no views.
NO_KERNEL = {aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}
NO_KERNEL |= {aten.promote_types}
# Fill and copy; fill and diagonal; copy and product (aten/src/ATen/native: PadNd.cpp,
# cuda/TensorFactories.cu, cuda/Blas.cpp).
TWO_KERNELS = {aten.constant_pad_nd, aten.eye, aten.baddbmm}


def kernels(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """Return the number of kernels that a call of an operator launches."""
    operator = func.overloadpacket
    if func.is_view or operator in NO_KERNEL:
        return 0
    if operator is aten.convolution:  # cuDNN's has no bias, which is added after it
        return 1 if args[2] is None else 2
    if operator is aten.convolution_backward:  # one for each gradient
        return sum(tensor is not None for tensor in result)
    return 2 if operator in TWO_KERNELS else 1


class Launches(TorchDispatchMode):
    """A dispatch mode that counts kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += kernels(func, args, result)
        return result


def count_launches(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """Count the kernels of a training forward and of its backward, on the meta device."""
    layer = deepcopy(layer).to("meta").train()
    x = torch.empty(shape, device="meta", requires_grad=True)
    layer(x)  # makes what later steps reuse
    with Launches() as forward:
        out = layer(x)
    grad = torch.empty_like(out)
    with Launches() as backward:
        out.backward(grad)
    return forward.count, backward.count
