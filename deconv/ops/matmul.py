"""The two products of the method, on vectors that lie along the channels of a map.

Matrices times vectors, and the sum of outer products: each is the other's gradient. Either every
map has a product of its own, as it lies, or the vectors of all maps are copied side by side for
one product: whichever the shape makes faster.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")

SHORT = 16  # vectors of a map from which on it is multiplied by itself on a CPU
LARGE, STRIPS = 256, 3  # a symmetric matrix of this side on a CPU is computed in so many strips


def is_traced(x: torch.Tensor) -> bool:
    """Whether x only stands for numbers, for a compiler, say: nothing of it may outlive that."""
    return torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter)


def keep_last(count: int, make: Callable[..., T]) -> Callable[..., T]:
    """`make`, which remembers its last so many results, and for good what a recorded graph reads.

    A graph reads it where it was, whatever has been asked for in the meantime.

    Args:
        make: of values that say what, and of `device`.
    """
    # Outside of inference mode, as a later backward may want to keep it.
    remember = lru_cache(maxsize=count)(torch.inference_mode(False)(make))
    recorded = []

    def find(*key: object, device: torch.device) -> T:
        found = remember(*key, device=device)
        if _records(device):
            recorded.append(found)
        return found

    return find


def _records(device: torch.device) -> bool:
    """Whether what is launched is recorded, on a device that can do that."""
    ask = getattr(getattr(torch, device.type, None), "is_current_stream_capturing", None)
    return ask is not None and ask()


def identity(like: torch.Tensor) -> torch.Tensor:
    """The identity matrix (d, d) for matrices (..., d, d): not to be written into."""
    make = _make_identity if is_traced(like) else _cached_identity
    return make(like.shape[-1], like.dtype, device=like.device)


def _make_identity(side: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.eye(side, dtype=dtype, device=device)


_cached_identity = keep_last(32, _make_identity)


def transform(matrices: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """A_g v for every vector v of group g.

    Args:
        matrices: (G, d, d).
        maps: (R, G * d, L): R * L vectors in each group.

    Returns:
        (R, G * d, L).
    """
    if maps.shape[2] == 1:  # a view of its product, which no Function may return
        return _multiply_rows(matrices, maps)
    differs = torch.is_grad_enabled() and matrices.requires_grad
    return (_Transform.apply if differs else _multiply)(matrices, maps)


def outer_products(
    left: torch.Tensor, right: torch.Tensor, groups: int, scale: float = 1.0
) -> torch.Tensor:
    """The sum of u v^T over the pairs of vectors of each group, times `scale`, (groups, d, d).

    Args:
        left, right: (R, groups * d, L).
    """
    differs = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    return (_OuterProducts.apply if differs else _sum_products)(left, right, groups, scale)


class _Transform(torch.autograd.Function):
    # Not for torch.func: `setup_context`, which it asks for, has the signature of `forward` read at
    # each call. What it transforms is in evaluation, where matrices are constants.
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
    def forward(
        ctx, left: torch.Tensor, right: torch.Tensor, groups: int, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(left, right)
        ctx.scale = scale
        return _sum_products(left, right, groups, scale)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        left, right = ctx.saved_tensors
        to_left, to_right, *_ = ctx.needs_input_grad
        grad = grad if ctx.scale == 1 else grad * ctx.scale
        return (
            transform(grad, right) if to_left else None,
            transform(grad.mT, left) if to_right else None,
            None,
            None,
        )


def _multiply(matrices: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    groups, side, length = *matrices.shape[:2], maps.shape[2]
    # On a GPU copies cost launches; but many matrices times one vector each wait for memory.
    if length >= (SHORT if maps.device.type == "cpu" else 2):
        if groups == 1:  # without the views by which `@` finds out that there is nothing to repeat
            return torch.bmm(matrices.expand(len(maps), -1, -1), maps)
        if 2 * length >= side:  # `@` repeats matrices for each map: less than copies of the maps
            return (matrices @ maps.unflatten(1, (groups, side))).flatten(1, 2)
    return _multiply_rows(matrices, maps)


def _multiply_rows(matrices: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """By one product a group, of vectors copied to lie in rows."""
    (groups, side, _), (count, _, length) = matrices.shape, maps.shape
    rows = maps.unflatten(1, (groups, side)).permute(1, 0, 3, 2).flatten(1, 2)  # G, R*L, d
    rows = (rows @ matrices.mT).unflatten(1, (count, length))
    return rows.permute(1, 0, 3, 2).reshape(maps.shape)


def _sum_products(
    left: torch.Tensor, right: torch.Tensor, groups: int, scale: float
) -> torch.Tensor:
    # Compiled, nothing is in place: a graph of PyTorch 2.11 returns all that a Function's forward
    # makes. What is written into and what that gives are one tensor, twice: no gradient comes.
    side, length = left.shape[1] // groups, left.shape[2]
    pair = (left,) if left is right else (left, right)
    pair = [x.unflatten(1, (groups, side)) for x in pair]  # R, G, d, L
    if left.device.type == "cpu" and 2 * length >= side:  # products no larger than the vectors
        return (pair[0] @ pair[-1].mT).sum(0) * scale
    columns = [x.permute(1, 2, 0, 3).flatten(2) for x in pair]  # G, d, R*L
    if left is right and left.device.type == "cpu" and side >= LARGE and not is_traced(left):
        return _multiply_by_itself(columns[0], scale)
    # In place saves a GPU a copy, for which a compiler has its own hooks.
    multiply = torch.baddbmm if torch.compiler.is_compiling() else torch.Tensor.baddbmm_
    result = left.new_empty(groups, side, side)
    return multiply(result, columns[0], columns[-1].mT, beta=0, alpha=scale)


def _multiply_by_itself(columns: torch.Tensor, scale: float) -> torch.Tensor:
    """X X^T of X (G, d, n), times `scale`, with two thirds of the multiplications.

    A strip of rows at a time, from the diagonal on; what lies before it mirrors the strips above.
    """
    groups, side, _ = columns.shape
    result, height = columns.new_empty(groups, side, side), -(-side // STRIPS)
    for first in range(0, side, height):
        strip = slice(first, first + height)
        after = columns[:, first:].mT
        result[:, strip, first:].baddbmm_(columns[:, strip], after, beta=0, alpha=scale)
        result[:, strip, :first] = result[:, :first, strip].mT
    return result
