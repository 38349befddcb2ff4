"""Normalise each sample of a batch by its own statistics (Ye et al., AAAI 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

INPUT_NORMS = ("none", "layer", "l1")
EPS = 1e-5


def normalize_samples(x: Tensor, norm: str, dims: int, eps: float = EPS) -> Tensor:
    """Divide each sample by its own scale, so that a positive factor of a sample cancels.

        layer    y = (x - mean(x)) / (std(x) + eps)
        l1       y = x / (mean |x| + eps)

    Mean and unbiased standard deviation are over all elements of a sample. An all-zero sample stays
    zero.

    NOTE (differs from the published code): the published "l1norm" averages only every
    `sampling_stride`-th element.

    Args:
        x: (*batch, *sample).
        norm: "layer" or "l1"; "none" returns x.
        dims: number of dimensions of a sample, channels included: 3 for images, 1 for vectors.
        eps: added to the scale (default 1e-5), in units of x. A scale far above `eps` cancels.

    Returns:
        (*batch, *sample) in the dtype of x, computed in at least float32.

    Example:
        y = normalize_samples(torch.randn(8, 3, 32, 32), "l1", dims=3)  # y[0].abs().mean() is 1
    """
    if norm == "none":
        return x
    sample = tuple(range(-dims, 0))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm == "layer":
        wide = wide - wide.mean(sample, keepdim=True)
        freedom = max(math.prod(x.shape[-dims:]) - 1, 1)
        # The gradient of this norm is finite at 0; that of the root of a variance is not.
        scale = torch.linalg.vector_norm(wide, dim=sample, keepdim=True) / freedom**0.5
    else:
        scale = wide.abs().mean(sample, keepdim=True)
    return (wide / (scale + eps)).to(x.dtype)
