"""Whitening by the inverse Cholesky factor.

Every D with D A D^T = I whitens. The symmetric root and the inverse factor L^-1 differ by a
rotation. Newton-Schulz steps leave a soft floor, see `inverse_sqrt`: n steps amplify no direction
by more than 1.5^n / sqrt(|A|_F). The inverse root of A + 1.5^(-2n) |A|_F I has the same bound.

NOTE (differs from paper): the paper uses the symmetric root.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .constants import find_identity, find_lower_mask
from .matmul import frobenius_norm, scaled_product
from .once import differentiable_once
from .precision import DEVICES, in_full_products


def inverse_cholesky(cov: Tensor, n_iter: int = 5, eps: float = 0.0) -> Tensor:
    """Return L^-1 of A + 1.5^(-2 n_iter) |A|_F I = L L^T, where A = cov + eps I.

    The condition number of that matrix is at most 1.5^(2 n_iter), 58 for five steps. Float32 is
    enough for every A.

    Args:
        cov: (G, F, F), symmetric positive semidefinite, float32 or float64.
        n_iter: Newton-Schulz steps whose floor is kept, at least 1.
        eps: added to the diagonal, in units of variance.

    Returns:
        (G, F, F), lower triangular. NaN for a matrix that is not finite.
    """
    floor = 1.5 ** (-2 * n_iter)
    if cov.requires_grad:
        return _InverseCholesky.apply(cov, floor, eps)
    return _invert_factor(cov, floor, eps)[0]  # torch.func transforms plain operations only


def _invert_factor(cov: Tensor, floor: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return L^-1 and the terms of its gradient: A and |A|_F."""
    identity = find_identity(cov)
    cov = torch.add(cov, identity, alpha=eps)
    norm = _wide_norm(cov)
    factor = torch.linalg.cholesky_ex(cov.addcmul(identity, norm, value=floor)).L
    return torch.linalg.solve_triangular(factor, identity.expand_as(cov), upper=False), cov, norm


def _wide_norm(cov: Tensor) -> Tensor:
    """Return `frobenius_norm(cov)` in few launches, of squares in float64 where a device has it.

    The norm of a single matrix stays a float64 scalar. Elementwise operations convert a scalar to
    the dtype of their matrices, in the same launch.
    """
    if cov.device.type not in (*DEVICES, "meta"):
        return frobenius_norm(cov)
    norm = torch.linalg.vector_norm(cov, dim=(1, 2), keepdim=True, dtype=torch.float64)
    norm = norm.squeeze() if len(cov) == 1 else norm.to(cov.dtype)
    # The inverse of infinity is 0. Larger matrices have 0 * infinity beside the diagonal.
    return norm.fmod(torch.inf) if cov.shape[-1] == 1 else norm


class _InverseCholesky(torch.autograd.Function):
    """Gradient dD = -P(D dA D^T) D; P takes the lower triangle and half the diagonal.

    That in A is -D^T (P(M) + P(M)^T) D / 2 with M = G D^T, for the gradient G in D.
    """

    @staticmethod
    def forward(ctx: Any, cov: Tensor, floor: float, eps: float) -> Tensor:
        inverse, cov, norm = _invert_factor(cov, floor, eps)
        ctx.floor = floor
        ctx.save_for_backward(cov, norm, inverse)
        return inverse

    @staticmethod
    @differentiable_once
    @in_full_products
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cov, norm, inverse = ctx.saved_tensors
        inner = scaled_product(grad, inverse.mT)
        inner = torch.where(find_lower_mask(inner), inner, inner.mT)  # P(M) + P(M)^T
        result = scaled_product(scaled_product(inverse.mT, inner), inverse, -0.5)
        trace = result.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        return result.addcmul_(cov, trace / norm, value=ctx.floor), None, None
