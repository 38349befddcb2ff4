"""Normalise each sample of a batch by its own statistics (the follow-up paper, AAAI 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

INPUT_NORMS = ("none", "layer", "l1")
EPS = 1e-5


def normalize_samples(x: Tensor, norm: str, dims: int, eps: float = EPS) -> Tensor:
    """Return each sample divided by its own scale, so that factors of a sample cancel.

        layer    y = (x - mean(x)) / (std(x) + eps)
        l1       y = x / (mean |x| + eps)

    Mean and unbiased standard deviation cover all elements of a sample. A sample of zeros stays 0.

    NOTE (differs from the published code): its "l1norm" averages a sample of the elements.

    Args:
        x: (*batch, *sample).
        norm: "layer" or "l1"; "none" returns x.
        dims: dimensions of a sample, channels included: 3 for images, 1 for rows of features.
        eps: added to the scale, in units of x. Scales far above `eps` cancel.

    Returns:
        The shape and dtype of x, computed in at least float32.

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
        # Unlike the root of a variance, this norm has a gradient at 0.
        scale = torch.linalg.vector_norm(wide, dim=sample, keepdim=True) / freedom**0.5
    else:
        scale = wide.abs().mean(sample, keepdim=True)
    return (wide / (scale + eps)).to(x.dtype)
