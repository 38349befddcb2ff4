"""Whitening by the Cholesky factor: D = L^-1 with L L^T = A + floor, at a tenth of a root's price.

Any D with D A D^T = I whitens; the symmetric root and L^-1 differ by a rotation. What must be kept
is the soft floor that a few Newton-Schulz steps leave (see `inverse_sqrt`): n steps amplify no
direction by more than 1.5^n / sqrt(|A|_F), and neither does the inverse root of

    A + 1.5^(-2n) |A|_F I.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from .matmul import identity


def inverse_cholesky(cov: torch.Tensor, n_iter: int = 5, eps: float = 0.0) -> torch.Tensor:
    """L^-1 of A + 1.5^(-2 n_iter) |A|_F I = L L^T, where A = cov + eps I.

    The condition of that matrix is at most 1.5^(2 n_iter), 58 for five steps, so float32 is enough
    whatever A is.

    Args:
        cov: (G, F, F), symmetric positive semidefinite, float32 or float64.
        n_iter: Newton-Schulz steps whose floor is kept, at least 1.
        eps: added to the diagonal, in units of variance.

    Returns:
        (G, F, F), lower triangular. NaN for a matrix that is not finite.
    """
    share = 1.5 ** (-2 * n_iter)
    if cov.requires_grad:
        return _InverseCholesky.apply(cov, share, eps)
    return _invert(cov, share, eps)[0]  # what torch.func transforms as well


def _invert(cov: torch.Tensor, share: float, eps: float) -> tuple[torch.Tensor, ...]:
    """L^-1, and what its gradient is made of: A and |A|_F."""
    unit = identity(cov)
    cov = torch.add(cov, unit, alpha=eps)
    norm = torch.linalg.matrix_norm(cov, keepdim=True)
    if cov.shape[-1] == 1:  # elsewhere infinity times the zeros beside the diagonal is NaN
        norm = norm.fmod(math.inf)  # so is this, where the inverse would be 0
    factor = torch.linalg.cholesky_ex(cov.addcmul(unit, norm, value=share)).L
    return torch.linalg.solve_triangular(factor, unit.expand_as(cov), upper=False), cov, norm


class _InverseCholesky(torch.autograd.Function):
    """dD = -P(D dA D^T) D, P the lower triangle with half the diagonal; floor included."""

    @staticmethod
    def forward(ctx, cov: torch.Tensor, share: float, eps: float) -> torch.Tensor:
        inverse, cov, norm = _invert(cov, share, eps)
        ctx.share = share
        ctx.save_for_backward(cov, norm, inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cov, norm, inverse = ctx.saved_tensors
        inner = torch.bmm(grad, inverse.mT).tril_()
        inner.diagonal(dim1=-2, dim2=-1).mul_(0.5)
        outer = torch.bmm(torch.bmm(inverse.mT, inner), inverse)
        result = outer.add(outer.mT).mul_(-0.5)
        trace = result.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        return result.addcmul_(cov, trace / norm, value=ctx.share), None, None
