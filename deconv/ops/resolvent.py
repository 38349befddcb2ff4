"""Newton-Schulz whitening within 0.75 %, from a matrix inverse or a few.

n steps of Newton-Schulz (see `inverse_sqrt`) map the eigenvalues x of A / |A|_F, in [0, 1], to
z_n(x). This function is smooth down to the soft floor near 1.5^(-2n). One pole per four steps
beyond the first follows it:

    z_n(x) ~ c + m x + sum_j a_j / (x + s_j),        one pole for n <= 5, four for n = 15

    D ~ (c I + m A' + sum_j a_j (A' + s_j I)^-1) / sqrt(|A|_F),        A' = A / |A|_F

D is symmetric, as that of the iteration. Unlike the Cholesky factor, D does not rotate while the
covariance moves. For five steps A' + s I has a condition number of at most 20.

NOTE (differs from paper): the paper runs the iteration itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .constants import find_identity
from .matmul import frobenius_norm, scaled_product
from .once import differentiable_once
from .precision import in_full_products


class Terms(NamedTuple):
    """Coefficients of z_n: c, m and the pairs (s, a)."""

    constant: float
    slope: float
    poles: tuple[tuple[float, float], ...]


# By number of steps, fitted by scripts/dev/fit_resolvent.py: the largest relative error on [0, 1]
# is 0.74 %.
TERMS = {
    1: Terms(1.5, -0.5, ()),
    2: Terms(-3.2593, 0.81569, ((1.6666, 9.1848),)),
    3: Terms(-0.077342, 0.21693, ((0.3323, 1.152),)),
    4: Terms(0.50385, 0.0040864, ((0.12187, 0.55993),)),
    5: Terms(0.86376, -0.19493, ((0.052387, 0.35536),)),
    6: Terms(-2.2882, 0.42484, ((0.022992, 0.23251), (2.5888, 9.4358))),
    7: Terms(0.4747, -0.058212, ((0.01008, 0.15182), (0.34191, 0.57168))),
    8: Terms(0.56233, -0.032149, ((0.0044858, 0.10142), (0.16609, 0.43801))),
    9: Terms(0.95871, -0.28211, ((0.0019882, 0.067335), (0.068438, 0.26617))),
    10: Terms(0.88649, -0.25006, ((0.00088289, 0.044829), (0.028047, 0.15183), (0.19693, 0.19659))),
    11: Terms(0.95672, -0.28304, ((0.00038981, 0.02959), (0.01022, 0.078374), (0.088645, 0.23072))),
    12: Terms(
        0.92614, -0.26665, ((0.00017456, 0.019951), (0.0058432, 0.074154), (0.095766, 0.26276))
    ),
    13: Terms(
        0.96989, -0.28628, ((7.7655e-05, 0.013319), (0.0026999, 0.052379), (0.063618, 0.25965))
    ),
    14: Terms(
        0.73787,
        -0.13909,
        ((3.4506e-05, 0.0088767), (0.001189, 0.034431), (0.023142, 0.1288), (0.19799, 0.28625)),
    ),
    15: Terms(
        0.8174,
        -0.17318,
        ((1.5316e-05, 0.0059072), (0.00051096, 0.021934), (0.0079781, 0.068881), (0.10021, 0.2929)),
    ),
}


def inverse_sqrt_by_resolvents(
    cov: Tensor, n_iter: int = 5, eps: float = 0.0, rows: Tensor | None = None
) -> Tensor:
    """Approximate the result of `n_iter` Newton-Schulz steps on A = cov + eps I within 0.75 %.

    Args:
        cov: (G, F, F), symmetric positive semidefinite, float32 or float64.
        n_iter: number of steps, a key of `TERMS`.
        eps: added to the diagonal, in units of variance.
        rows: (G, M, F), the vectors that `cov` is the mean square of; see `_invert_from_rows`.
            Gradients flow through `cov` alone.

    Returns:
        (G, F, F), symmetric. NaN for a matrix that is not finite.

    Raises:
        ValueError: `n_iter` is above the largest key of `TERMS`.
    """
    if n_iter not in TERMS:
        raise ValueError(f"n_iter must be at most {max(TERMS)} for resolvents, got {n_iter}")
    rows = None if rows is None else rows.detach()
    if cov.requires_grad:
        return _Resolvents.apply(cov, rows, n_iter, eps)
    return _sum_terms(cov, rows, n_iter, eps)[0]  # torch.func transforms plain operations only


def _sum_terms(cov: Tensor, rows: Tensor | None, n_iter: int, eps: float) -> tuple[Tensor, ...]:
    """Return D and the terms of its gradient: A / |A|_F, |A|_F^(-1/2), |A|_F and the resolvents."""
    identity = find_identity(cov)
    cov = torch.add(cov, identity, alpha=eps)
    norm = frobenius_norm(cov)
    scaled = cov / norm
    constant, slope, poles = TERMS[n_iter]
    root = torch.add(find_identity(cov, constant), scaled, alpha=slope)
    scale = norm.rsqrt()
    rows = None if rows is None else rows * scale
    resolvents = []
    for shift, weight in poles:
        if rows is None:
            factor = torch.linalg.cholesky_ex(torch.add(scaled, identity, alpha=shift)).L
            half = torch.linalg.solve_triangular(factor, identity.expand_as(cov), upper=False)
            resolvents.append(half.mT @ half)
        else:
            one, shifted = find_identity(norm), find_identity(norm, shift)  # 1 x 1
            shifted = torch.addcdiv(shifted, one, norm, value=eps)
            resolvents.append(_invert_from_rows(rows, shifted, identity))
        root = torch.add(root, resolvents[-1], alpha=weight)
    return root * scale, scaled, scale, norm, *resolvents


def _invert_from_rows(rows: Tensor, shift: Tensor, identity: Tensor) -> Tensor:
    """Return (X^T X / M + t I)^-1 from the M x M side, cheaper than from F x F for 2 M < F.

        (X^T X / M + t I)^-1 = (I - X^T (X X^T / M + t I)^-1 X / M) / t              (Woodbury)

    Args:
        rows: X, (G, M, F).
        shift: t, (G, 1, 1).
        identity: (F, F).
    """
    share = 1 / rows.shape[1]
    small = scaled_product(rows, rows.mT, share)
    factor = torch.linalg.cholesky_ex(small.addcmul(find_identity(small), shift)).L
    inner = torch.cholesky_solve(rows, factor)
    return torch.baddbmm(identity, rows.mT, inner, alpha=-share) / shift


class _Resolvents(torch.autograd.Function):
    """Gradient d(A' + s I)^-1 = -(A' + s I)^-1 dA' (A' + s I)^-1, and that of the norm in A'."""

    @staticmethod
    def forward(ctx: Any, cov: Tensor, rows: Tensor | None, n_iter: int, eps: float) -> Tensor:
        root, *parts = _sum_terms(cov, rows, n_iter, eps)
        ctx.terms = TERMS[n_iter]
        ctx.save_for_backward(root, *parts)
        return root

    @staticmethod
    @differentiable_once
    @in_full_products
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        root, scaled, scale, norm, *resolvents = ctx.saved_tensors
        grad = grad.add(grad.mT).mul_(scale / norm)  # twice the gradient of A'
        pull = _inner(root, grad)
        products = [scaled_product(resolvent, grad) for resolvent in resolvents]
        factor = 0.5 * ctx.terms.slope  # of `grad`, applied with the first product
        for product, resolvent, (_, weight) in zip(
            products, resolvents, ctx.terms.poles, strict=True
        ):
            grad.baddbmm_(product, resolvent, beta=factor, alpha=-0.5 * weight)
            factor = 1.0
        result = grad if products else grad * factor
        # D = z(A') / sqrt(|A|) and A' = A / |A| both shrink as |A| grows.
        shrinkage = _inner(scaled, result).addcdiv_(pull, scale, value=0.25)
        return result.addcmul_(scaled, shrinkage, value=-1), None, None, None


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum of products of all elements, (G, 1, 1)."""
    return scaled_product(left.flatten(1)[:, None], right.flatten(1)[..., None])
