"""Fold mean and whitening into the weight and the bias of a convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .blocks import Blocks, transform_along
from .matmul import multiply, scaled_product
from .precision import in_full_products


def fold(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    whiten: Mapping[str, Tensor],
    blocks: Blocks,
) -> tuple[Tensor, Tensor]:
    """Return the weight and bias that act on raw patches as the given ones on whitened patches.

        y = W D (x - mu) + b = (W D) x + (b - W D mu)

    This is exact, borders included: mu and D describe the padded patches, and padding stays raw.

    Args:
        weight: W, (out, C, *kernel), C channels of one group.
        bias: b, (out,); None counts as zero.
        mean: mu, (groups * C*T,), or (groups * C,) when all taps have the mean of their channel.
        whiten: D by axis, (G, d, d) each, see `Blocks.to_vectors`.
        blocks: the view of `weight.flatten(1)` as blocks.

    Returns:
        W D of the shape of `weight`, and b - W D mu, (out,).
    """
    groups = blocks.groups
    maps = weight.reshape(groups, len(weight) // groups, -1).transpose(0, 1)  # out groups C*T
    maps = maps.reshape(len(maps), -1, 1)
    for axis, matrix in whiten.items():
        maps = transform_along(axis, maps, matrix.mT, blocks)
    rows = maps.reshape(len(maps), groups, -1).transpose(0, 1)  # groups out C*T
    mean = mean.reshape(groups, -1, 1)
    if mean.shape[1] != rows.shape[2]:
        mean = mean.repeat_interleave(blocks.taps, dim=1)
    if torch.is_grad_enabled() and mean.requires_grad:
        rows, bias = _ShiftBias.apply(rows, mean, bias)
    else:
        shift = multiply(rows, mean).flatten()
        bias = -shift if bias is None else bias - shift
    return rows.reshape(weight.shape), bias


class _ShiftBias(torch.autograd.Function):
    """b - W D mu, with W D; in the backward pass, both gradients of W D in one addition.

    torch.func needs plain operations, as in `_Transform`.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, mean: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, mean)
        shift = scaled_product(rows, mean, -1).flatten()
        return rows, shift if bias is None else bias + shift

    @staticmethod
    @in_full_products
    def backward(ctx: Any, grad: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
        rows, mean = ctx.saved_tensors
        column = grad_bias.reshape(len(rows), -1, 1)
        to_rows = torch.addcmul(grad, column, mean.mT, value=-1)
        if torch.is_grad_enabled():  # for a second derivative
            to_mean = -multiply(rows.mT, column)
        else:
            to_mean = scaled_product(rows.mT, column, -1)
        return to_rows, to_mean, grad_bias if ctx.needs_input_grad[2] else None
