"""Absorb (mean, whitening) into the weight and the bias of the convolution that follows."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .blocks import Blocks, transform_along


def fold(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    whiten: Mapping[str, torch.Tensor],
    blocks: Blocks,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and bias that act on raw patches as the given ones act on whitened patches.

        y = W D (x - mu) + b = (W D) x + (b - W D mu)

    Exact, borders included, because mu and D describe the padded patches and padding stays raw.

    Args:
        weight: (out, C, *kernel), C channels of one group.
        bias: (out,) or None, which counts as zero.
        mean: (groups * C*T,), or (groups * C,) when all taps have the mean of their channel.
        whiten: whitening matrices by axis, see `Blocks.to_vectors`.
        blocks: the view of `weight.flatten(1)` as blocks.

    Returns:
        (weight, bias) of the shapes of `weight` and (out,).
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
    # A compiler adds the two gradients of rows as it likes.
    plain = torch.compiler.is_compiling() or not mean.requires_grad
    rows, shift = (rows, rows @ mean) if plain else _Shift.apply(rows, mean)
    shift = shift.flatten()
    bias = -shift if bias is None else bias - shift
    return rows.reshape(weight.shape), bias


def whiten_pixels(
    x: torch.Tensor, mean: torch.Tensor, whiten: Mapping[str, torch.Tensor], blocks: Blocks
) -> tuple[torch.Tensor, torch.Tensor]:
    """D x and D mu, where channels alone are whitened: nothing but D mu is left to be folded.

        y = (W D) x + (b - W D mu) = W (D x) + (b - W (D mu))

    Zeros stay zeros, so padding stays what it is. For maps that are smaller than the weight.

    Args:
        x: (N, C, *size).
        mean: (C,).
        whiten: one matrix (G, d, d) for each axis, in the order in which they act.
        blocks: the view of x as blocks, of one tap.
    """
    maps, means = x.to(mean.dtype).flatten(2), mean[None, :, None]
    for axis, matrix in whiten.items():
        maps, means = (transform_along(axis, each, matrix, blocks) for each in (maps, means))
    return maps.reshape(x.shape).to(x.dtype), means.flatten()


class _Shift(torch.autograd.Function):
    """What the mean adds to the outputs, W D mu (groups, out, 1), and W D itself.

    It is handed on so that its gradient comes through here, and the mean's part of it is added
    where it lies instead of filling a second weight.
    """

    @staticmethod
    def forward(ctx, weight: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(weight, mean)
        return weight.view_as(weight), weight @ mean

    @staticmethod
    def backward(
        ctx, grad: torch.Tensor, grad_shift: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight, mean = ctx.saved_tensors
        # Where a graph of this backward is wanted, it may need `grad` as it is.
        add = torch.baddbmm if torch.is_grad_enabled() else torch.Tensor.baddbmm_
        return add(grad, grad_shift, mean.mT), weight.mT @ grad_shift
