"""Absorb (mean, whitening) into the weight and the bias of the convolution that follows."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .blocks import Blocks


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
        mean: (G, S, 1, F), or (G, S, 1, B) when all taps have the mean of their channel.
        whiten: whitening matrices by axis, see `whiten_along`.
        blocks: the view of `weight.flatten(1)` as blocks.

    Returns:
        (weight, bias) of the shapes of `weight` and (out,).
    """
    out = weight.shape[0]
    rows = weight.reshape(blocks.groups, out // blocks.groups, -1)
    rows = blocks.split(rows)  # G S out F
    for axis, matrix in whiten.items():
        rows = whiten_along(axis, rows, matrix, blocks.size)
    if mean.shape[-1] != rows.shape[-1]:
        mean = mean.repeat_interleave(blocks.taps, dim=-1)
    shift = (rows @ mean.mT).reshape(blocks.groups, blocks.count, -1)  # W D mu, by block
    shift = shift.sum(dim=1).flatten()  # out
    bias = -shift if bias is None else bias - shift
    return blocks.merge(rows).reshape(weight.shape), bias


def whiten_along(
    axis: str, rows: torch.Tensor, matrix: torch.Tensor, channels: int
) -> torch.Tensor:
    """Multiply rows of F = B * T features by a symmetric matrix along one axis.

    Args:
        axis: "joint" (matrix F x F), "channel" (B x B, the same at every tap) or
            "pixel" (T x T, the same for every channel).
        rows: (G, S, M, F).
        matrix: (G, d, d).
        channels: B.

    Returns:
        (G, S, M, F).
    """
    if axis == "joint":
        return (rows.flatten(1, 2) @ matrix).reshape(rows.shape)
    grid = rows.unflatten(-1, (channels, -1))  # G S M B T
    matrix = matrix[:, None, None]
    return (matrix @ grid if axis == "channel" else grid @ matrix).flatten(-2)


def vectors_along(axis: str, rows: torch.Tensor, channels: int) -> torch.Tensor:
    """The vectors that `whiten_along` multiplies, as rows (G, S, M', d): d is B, T or F."""
    if axis == "joint":
        return rows
    grid = rows.unflatten(-1, (channels, -1))  # G S M B T
    return (grid.mT if axis == "channel" else grid).flatten(2, 3)  # G S M*T B; G S M*B T
