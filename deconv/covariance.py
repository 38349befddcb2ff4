"""Rows -> their mean and regularised covariance."""

from __future__ import annotations

import torch


def centre(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of every feature, and the rows without it.

    NOTE (differs from the published code): blocks that share a matrix keep a mean each. Pooling the
    means too leaves features off centre and their offsets inside the covariance.

    Args:
        rows: (G, S, M, F), M rows of F features for S blocks, G times.

    Returns:
        mean (G, S, 1, F) and centred rows (G, S, M, F).
    """
    mean = rows.mean(dim=2, keepdim=True)
    return mean, rows - mean


def covariance(centred: torch.Tensor, eps: float) -> torch.Tensor:
    """Cov = mean_m x_m x_m^T + eps I of centred rows.

    The rows are centred before the product: E[xx^T] - mu mu^T would cancel in float32.

    Args:
        centred: (G, M, F), M rows of mean zero; blocks that share a matrix are simply more rows.
        eps: added to the diagonal, in units of variance.

    Returns:
        (G, F, F), symmetric, positive definite for eps > 0.
    """
    return _SecondMoment.apply(centred, eps)


class _SecondMoment(torch.autograd.Function):
    """X^T X / M + eps I. Its gradient, X (G + G^T) / M, is one product; autograd takes two."""

    @staticmethod
    def forward(rows: torch.Tensor, eps: float) -> torch.Tensor:
        identity = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
        scale = 1 / max(rows.shape[1], 1)
        return torch.baddbmm(identity, rows.mT, rows, beta=eps, alpha=scale)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, float], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        # Transposed twice, so that the gradient lies in memory as the rows do.
        return ((grad + grad.mT) / max(rows.shape[1], 1) @ rows.mT).mT, None
