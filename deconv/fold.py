"""Absorb (mean, whitening) into the weight and the bias of the convolution that follows."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .blocks import Blocks
from .triangle import times_lower


def fold(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    whiten: Mapping[str, torch.Tensor],
    blocks: Blocks,
    *,
    lower: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and bias that act on raw patches as the given ones act on whitened patches.

        y = W D (x - mu) + b = (W D) x + (b - W D mu)

    Exact, borders included, because mu and D describe the padded patches and padding stays raw.

    Args:
        weight: (out, C, *kernel), C channels of one group.
        bias: (out,) or None, which counts as zero.
        mean: (G, S, 1, F), or (G, S, 1, B) when all taps have the mean of their channel.
        whiten: whitening matrices by axis, see `whiten_along`.
        blocks: the view of `weight.flatten(1)` as blocks.
        lower: the matrices are lower triangular.

    Returns:
        (weight, bias) of the shapes of `weight` and (out,).
    """
    out = weight.shape[0]
    rows = weight.reshape(blocks.groups, out // blocks.groups, -1)
    for axis, matrix in whiten.items():
        # Output channels before blocks: so the weight is copied in longer runs, or not at all.
        grid = grid_along(axis, blocks.split(rows).transpose(1, 2), blocks.size)
        rows = blocks.merge(_multiply(axis, grid, matrix, lower=lower).transpose(1, 2))
    if mean.shape[-1] != blocks.features:
        mean = mean.repeat_interleave(blocks.taps, dim=-1)
    rows, shift = _Shift.apply(rows, blocks.merge(mean).mT)
    shift = shift.flatten()
    bias = -shift if bias is None else bias - shift
    return rows.reshape(weight.shape), bias


class _Shift(torch.autograd.Function):
    """What the mean adds to the outputs, W D mu (groups, out, 1), and W D itself.

    It is handed on so that its gradient comes through here, and the mean's part of it is added
    where it lies instead of filling a second weight.
    """

    @staticmethod
    def forward(ctx, weight: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(weight, mean)
        return weight, weight @ mean

    @staticmethod
    def backward(
        ctx, grad: torch.Tensor, grad_shift: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight, mean = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of this backward is wanted: it may need `grad` as is
            grad = grad.clone()
        return grad.baddbmm_(grad_shift, mean.mT), weight.mT @ grad_shift


def whiten_along(
    axis: str, rows: torch.Tensor, matrix: torch.Tensor, channels: int
) -> torch.Tensor:
    """D x for rows x of F = B * T features, D acting along one axis.

    Args:
        axis: "joint" (matrix F x F), "channel" (B x B, the same at every tap) or
            "pixel" (T x T, the same for every channel).
        rows: (G, S, M, F).
        matrix: (G, d, d).
        channels: B.

    Returns:
        (G, S, M, F).
    """
    return _multiply(axis, grid_along(axis, rows, channels), matrix.mT).flatten(3)


def grid_along(axis: str, rows: torch.Tensor, channels: int) -> torch.Tensor:
    """Rows (G, S, M, F) as a view with the axis last: (G, S, M, F), (.. T, B) or (.. B, T)."""
    if axis == "joint":
        return rows
    grid = rows.unflatten(-1, (channels, -1))
    return grid.mT if axis == "channel" else grid


def _multiply(
    axis: str, grid: torch.Tensor, matrix: torch.Tensor, *, lower: bool = False
) -> torch.Tensor:
    """The product along the last dimension of a grid, as (G, S, M, F) or (G, S, M, B, T)."""
    multiply = times_lower if lower else torch.matmul
    white = multiply(grid.flatten(1, -2), matrix).reshape(grid.shape)
    return white.mT if axis == "channel" else white
