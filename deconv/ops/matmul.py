"""The two products of the method, on vectors that lie along the channels of a map.

`transform` multiplies vectors by matrices, `outer_products` sums outer products of vectors. Each is
the gradient of the other.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import in_full_products, is_raised

WIDE = 64  # side of the matrices from which `CONVOLVES` applies


def _is_amd() -> bool:
    """Return True if the CPU is from AMD."""
    file = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (file.read_text() if file.exists() else platform.processor())


# MKL, which multiplies matrices, has no AVX-512 kernels for AMD. oneDNN, which convolves, has.
CONVOLVES = _is_amd() and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def saves_launches(device: torch.device) -> bool:
    """Return True for a GPU, where fewer launches are worth more operations."""
    return device.type != "cpu"


def transform(matrices: Tensor, maps: Tensor) -> Tensor:
    """Multiply every vector of group g by the matrix of group g.

    Args:
        matrices: (G, d, d).
        maps: (R, G * d, L): R * L vectors per group.

    Returns:
        (R, G * d, L).
    """
    if maps.shape[2] == 1:  # a view of the product, which no Function may return
        return _multiply_rows(matrices, maps)
    differs = (torch.is_grad_enabled() and matrices.requires_grad) or _needs_function(maps)
    return (_Transform.apply if differs else _multiply)(matrices, maps)


def frobenius_norm(cov: Tensor) -> Tensor:
    """Return |A|_F of symmetric positive semidefinite A (G, d, d) as (G, 1, 1), NaN for infinity.

    Squares overflow in float32 from variances of 1e19 on. The largest element is on the diagonal.
    Float64, as in `inverse_cholesky`, would enter exported Newton-Schulz iterations.
    """
    largest = cov.detach().diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]
    return largest * torch.linalg.matrix_norm(cov / largest, keepdim=True)


def outer_products(left: Tensor, right: Tensor, groups: int, scale: float = 1.0) -> Tensor:
    """Sum u v^T over the pairs of vectors of each group, times `scale`.

    Args:
        left: vectors u, (R, groups * d, L).
        right: vectors v, of the same shape.
        groups: number of groups.
        scale: factor of the sum.

    Returns:
        (groups, d, d).
    """
    differs = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    return (_OuterProducts.apply if differs else _sum_products)(left, right, groups, scale)


def multiply(
    left: Tensor, right: Tensor, base: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Return left @ right, or beta * base + alpha * left @ right for a constant base.

    Its gradient has the precision of the product, see `full_products`.
    """
    differs = _needs_function(left, right)
    return (_Product.apply if differs else _compute_product)(left, right, base, beta, alpha)


def scaled_product(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Return scale * left @ right of (G, m, k) and (G, k, n), in one launch and without autocast.

    The result is no function of its factors to autograd: for use inside a Function.
    """
    result = left.new_empty(len(left), left.shape[1], right.shape[2])
    return result.baddbmm_(left, right, beta=0, alpha=scale)


def add_product(base: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to base in place, (G, m, n), in one launch if their dtypes agree."""
    if base.dtype == left.dtype == right.dtype:
        base.baddbmm_(left, right)
    else:
        base += left @ right


def scaled_transform(matrices: Tensor, maps: Tensor, scale: float) -> Tensor:
    """Return scale * `transform(matrices, maps)`: for use inside a Function, as `scaled_product`.

    A single map takes one launch.
    """
    if len(maps) != 1 or _suits_convolution(maps, matrices.shape[1]):
        return _multiply(matrices * scale, maps)
    vectors = maps.reshape(len(matrices), matrices.shape[1], maps.shape[2])
    return scaled_product(matrices, vectors, scale).reshape(maps.shape)


def _compute_product(
    left: Tensor, right: Tensor, base: Tensor | None, beta: float, alpha: float
) -> Tensor:
    if base is None:
        return left @ right
    return torch.baddbmm(base, left, right, beta=beta, alpha=alpha)


class _Product(torch.autograd.Function):
    """Product whose gradient is computed in the precision of `full_products`."""

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, base: Tensor | None, beta: float, alpha: float
    ) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.alpha = alpha
        return _compute_product(left, right, base, beta, alpha)

    @staticmethod
    @in_full_products
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        to_left, to_right, *_ = ctx.needs_input_grad
        return (
            multiply(grad, right.mT) * ctx.alpha if to_left else None,
            multiply(left.mT, grad) * ctx.alpha if to_right else None,
            None,
            None,
            None,
        )


class _Transform(torch.autograd.Function):
    """Gradient of `transform` without a copy of the matrices per map.

    torch.func needs `setup_context`, which slows down every call. Layers use torch.func only in
    evaluation, where the matrices are constants and this class is not used.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor, maps: Tensor) -> Tensor:
        ctx.save_for_backward(matrices, maps)
        return _multiply(matrices, maps)

    @staticmethod
    @in_full_products
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        matrices, maps = ctx.saved_tensors
        to_matrices, to_maps = ctx.needs_input_grad
        return (
            outer_products(grad, maps, len(matrices)) if to_matrices else None,
            transform(matrices.mT, grad) if to_maps else None,
        )


class _OuterProducts(torch.autograd.Function):
    """Gradient of `outer_products`, by `transform`."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, groups: int, scale: float) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.scale = scale
        return _sum_products(left, right, groups, scale)

    @staticmethod
    @in_full_products
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        to_left, to_right, *_ = ctx.needs_input_grad
        grad = grad * ctx.scale
        return (
            transform(grad, right) if to_left else None,
            transform(grad.mT, left) if to_right else None,
            None,
            None,
        )


def _multiply(matrices: Tensor, maps: Tensor) -> Tensor:
    groups, side, length = *matrices.shape[:2], maps.shape[2]
    if _suits_convolution(maps, side):
        return F.conv1d(maps, matrices.reshape(-1, side, 1), groups=groups)
    if length > 1 and (groups == 1 or 2 * length >= side):  # else matrices are copied per map
        return (matrices @ maps.unflatten(1, (groups, side))).flatten(1, 2)
    return _multiply_rows(matrices, maps)


def _multiply_rows(matrices: Tensor, maps: Tensor) -> Tensor:
    """Copy the vectors of each group into rows, and multiply them at once."""
    (groups, side, _), (count, _, length) = matrices.shape, maps.shape
    rows = maps.unflatten(1, (groups, side)).permute(1, 0, 3, 2).flatten(1, 2)  # G R*L d
    rows = multiply(rows, matrices.mT).unflatten(1, (count, length))
    return rows.permute(1, 0, 3, 2).reshape(maps.shape)


def _sum_products(left: Tensor, right: Tensor, groups: int, scale: float) -> Tensor:
    side = left.shape[1] // groups
    if _suits_convolution(left, side):
        kernel = left.new_empty(1).expand(groups * side, side, 1)
        geometry = None, [1], [0], [1], False, [0], groups, [False, True, False]
        _, total, _ = torch.ops.aten.convolution_backward(left, right, kernel, *geometry)
        return total.view(groups, side, side) * scale
    pair = (left,) if left is right else (left, right)  # one copy where both are the same
    parts = [x.unflatten(1, (groups, side)) for x in pair]  # R G d L
    on_gpu = saves_launches(left.device)
    if not on_gpu and 2 * left.shape[2] >= side:  # products as small as the vectors
        return (parts[0] @ parts[-1].mT).sum(0) * scale
    rows = [x.permute(1, 2, 0, 3) for x in parts]  # G d R L
    copies = 1 not in left.shape[::2]  # else R*L is a view
    if on_gpu and copies and len(rows) == 2:
        rows = [*torch.cat(rows).chunk(2)]  # both in one launch
    rows = [each.flatten(2) for each in rows]  # G d R*L
    return scaled_product(rows[0], rows[-1].mT, scale)


def _needs_function(*factors: Tensor) -> bool:
    """Return True if a product needs a Function for the precision of its gradient."""
    return is_raised() and torch.is_grad_enabled() and any(x.requires_grad for x in factors)


def _suits_convolution(maps: Tensor, side: int) -> bool:
    """Return True if a convolution of width 1, or its gradient, computes the product fastest."""
    return CONVOLVES and maps.device.type == "cpu" and side >= WIDE and maps.shape[2] > 1
