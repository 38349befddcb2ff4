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
        mean: (G, 1, S, F), or (G, 1, S, B) when all taps have the mean of their channel.
        whiten: whitening matrices by axis, see `whiten_along`.
        blocks: the view of `weight.flatten(1)` as blocks.

    Returns:
        (weight, bias) of the shapes of `weight` and (out,).
    """
    out = weight.shape[0]
    rows = weight.reshape(blocks.groups, out // blocks.groups, -1)
    rows = blocks.split(rows)  # G out S F
    for axis, matrix in whiten.items():
        rows = whiten_along(axis, rows, matrix, blocks.size)
    if mean.shape[-1] != rows.shape[-1]:
        mean = mean.repeat_interleave(blocks.taps, dim=-1)
    shift = blocks.merge(rows * mean).sum(dim=-1).flatten()  # W D mu, per output channel
    bias = -shift if bias is None else bias - shift
    return blocks.merge(rows).reshape(weight.shape), bias


def whiten_along(
    axis: str, rows: torch.Tensor, matrix: torch.Tensor, channels: int
) -> torch.Tensor:
    """Multiply rows of F = B * T features by a symmetric matrix along one axis.

    Args:
        axis: "joint" (matrix F x F), "channel" (B x B, the same at every tap) or
            "pixel" (T x T, the same for every channel).
        rows: (G, M, S, F).
        matrix: (G, d, d).
        channels: B.

    Returns:
        (G, M, S, F).
    """
    if axis == "joint":
        return (rows.flatten(1, 2) @ matrix).view(rows.shape)
    grid = rows.unflatten(-1, (channels, -1))  # G M S B T
    matrix = matrix[:, None, None]
    return (matrix @ grid if axis == "channel" else grid @ matrix).flatten(-2)


def vectors_along(axis: str, rows: torch.Tensor, channels: int) -> torch.Tensor:
    """The vectors that `whiten_along` multiplies, as rows (G, M', S, d): d is B, T or F."""
    if axis == "joint":
        return rows
    grid = rows.unflatten(-1, (channels, -1))  # G M S B T
    grid = grid.permute(0, 1, 4, 2, 3) if axis == "channel" else grid.transpose(2, 3)
    return grid.flatten(1, 2)  # channel: G M*T S B; pixel: G M*B S T
