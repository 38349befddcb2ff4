"""The two products of the method, on vectors that lie along the channels of a map.

Matrices times vectors, and the sum of outer products: each is the other's gradient. Which routine
of torch is the fastest depends on the shape alone; none of them copies the maps if it can help it.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight

# Vectors of a map: from so many on it may have a product of its own with one matrix for all maps,
# and even with a matrix for each that is summed up.
SHORT, LONG = 16, 64


def transform(matrices: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """A_g v for every vector v of group g.

    Args:
        matrices: (G, d, d).
        maps: (R, G * d, L): R * L vectors in each group.

    Returns:
        (R, G * d, L).
    """
    if maps.shape[2] > 1:
        return _Transform.apply(matrices, maps)
    return _multiply_rows(matrices, maps)  # a view of its product, which no Function may return


def outer_products(left: torch.Tensor, right: torch.Tensor, groups: int) -> torch.Tensor:
    """The sum of u v^T over the pairs of vectors of each group, (groups, d, d).

    Args:
        left, right: (R, groups * d, L).
    """
    return _OuterProducts.apply(left, right, groups)


class _Transform(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrices: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(matrices, maps)
        return _multiply(matrices, maps)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        matrices, maps = ctx.saved_tensors
        to_matrices, to_maps = ctx.needs_input_grad
        return (
            outer_products(grad, maps, len(matrices)) if to_matrices else None,
            transform(matrices.mT, grad) if to_maps else None,
        )


class _OuterProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, left: torch.Tensor, right: torch.Tensor, groups: int) -> torch.Tensor:
        ctx.save_for_backward(left, right)
        return _sum_products(left, right, groups)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        left, right = ctx.saved_tensors
        to_left, to_right, _ = ctx.needs_input_grad
        return (
            transform(grad, right) if to_left else None,
            transform(grad.mT, left) if to_right else None,
            None,
        )


def _multiply(matrices: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    groups, side, _ = matrices.shape
    if groups == 1 and (maps.shape[2] >= SHORT or maps.device.type != "cpu"):
        return torch.bmm(matrices.expand(len(maps), side, side), maps)
    if groups > 1 and _convolves(maps):
        return F.conv1d(maps, matrices.reshape(groups * side, side, 1), groups=groups)
    return _multiply_rows(matrices, maps)


def _multiply_rows(matrices: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """By one product a group, of vectors copied to lie in rows."""
    (groups, side, _), (count, _, length) = matrices.shape, maps.shape
    rows = maps.unflatten(1, (groups, side)).permute(1, 0, 3, 2).flatten(1, 2)  # G, R*L, d
    rows = (rows @ matrices.mT).unflatten(1, (count, length))
    return rows.permute(1, 0, 3, 2).reshape(maps.shape)


def _sum_products(left: torch.Tensor, right: torch.Tensor, groups: int) -> torch.Tensor:
    side, length = left.shape[1] // groups, left.shape[2]
    if left.device.type == "cpu" and length >= LONG:
        left, right = (x.unflatten(1, (groups, side)).flatten(0, 1) for x in (left, right))
        return torch.bmm(left, right.mT).unflatten(0, (-1, groups)).sum(0)
    if _convolves(left) and length >= (SHORT if groups == 1 else 2):
        # The gradient of a 1 x 1 convolution for its weight, which is fast on maps as they lie.
        shape = (groups * side, side, 1)
        return conv1d_weight(right, shape, left, groups=groups).reshape(groups, side, side)
    columns = [
        x.unflatten(1, (groups, side)).permute(1, 2, 0, 3).flatten(2)  # a copy
        for x in ((left,) if left is right else (left, right))
    ]
    return columns[0] @ columns[-1].mT


def _convolves(maps: torch.Tensor) -> bool:
    """Whether torch convolves such maps on a CPU by a routine of its own for float32."""
    return maps.device.type == "cpu" and maps.dtype == torch.float32 and maps.numel() > 0
