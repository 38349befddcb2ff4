"""The inverse square root of covariances by coupled Newton-Schulz, and its two substitutes.

Source: Ye et al., ICLR 2020, section 3.2; Higham, Functions of Matrices, 2008, eq. 6.35.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cholesky import inverse_cholesky
from .matmul import frobenius_norm, multiply
from .precision import rounds_compiled
from .resolvent import inverse_sqrt_by_resolvents

MAX_STEPS = 15  # Newton-Schulz steps that float32 supports
MAX_STEPS_FROM_ROWS = 6  # float32 errors of `newton_schulz_from_rows` triple with each further step
ROOTS = ("newton", "resolvent", "cholesky")
Pair = tuple[Tensor, Tensor]


def inverse_sqrt(
    cov: Tensor,
    n_iter: int = 5,
    root: str = "newton",
    eps: float = 0.0,
    rows: Tensor | None = None,
) -> Tensor:
    """Approximate D = A^(-1/2) of A = cov + eps I with `n_iter` Newton-Schulz steps.

        Y0 = A / |A|_F,  Z0 = I;   T = (3 I - Z Y) / 2,  Y <- Y T,  Z <- T Z;   D = Z / sqrt(|A|_F)

    Z Y converges to I, Z to (A / |A|_F)^(-1/2). All eigenvalues of A / |A|_F lie in (0, 1], where
    the iteration converges: quadratically near 1, while a small eigenvalue grows by 2.25 a step.
    Stopping after five steps multiplies a direction by at most 1.5^5 = 7.6 / sqrt(|A|_F).
    Directions under about 0.02 |A|_F are damped, not whitened. This soft floor is part of the
    published regularisation: networks learn less with an exact root at the same eps.
    All iterates are polynomials of A: they are symmetric and commute, and D is symmetric.

    Rounding errors in float32 grow with every step after convergence. Five steps are good to 1e-6.
    MAX_STEPS are good to 1e-2 for the worst covariances of training (eps 1e-5, wide layers).

    Args:
        cov: (G, F, F), symmetric positive semidefinite, float32 or float64.
        n_iter: steps, at least 1; in float32 at most MAX_STEPS.
        root: "newton" for the above, symmetric. "resolvent" for `inverse_sqrt_by_resolvents`, the
            same within 0.75 %. "cholesky" for `inverse_cholesky`, lower triangular, with the floor
            of `n_iter` steps.
        eps: added to the diagonal, in units of variance.
        rows: (G, M, F), the centred vectors that `cov` is the mean square of. "newton" and
            "resolvent" then compute the same D on the M x M side, "newton" for up to
            MAX_STEPS_FROM_ROWS steps.

    Returns:
        (G, F, F). The gradient that D returns to `cov` is symmetric.

    Raises:
        ValueError: `n_iter` is below 1, or above MAX_STEPS for "resolvent".

    Example:
        whiten = inverse_sqrt(torch.cov(x.T, correction=0)[None], eps=1e-2)  # x: (M, F)
    """
    if n_iter < 1:
        raise ValueError(f"n_iter must be at least 1, got {n_iter}")
    if root == "cholesky":
        return inverse_cholesky(cov, n_iter, eps)
    if root == "resolvent":
        return inverse_sqrt_by_resolvents(cov, n_iter, eps, rows)
    newton: Callable[..., Tensor] = newton_schulz
    sources: tuple[Tensor, ...] = (_SymmetricGradient.apply(cov) if cov.requires_grad else cov,)
    if rows is not None and n_iter <= MAX_STEPS_FROM_ROWS:
        newton, sources = newton_schulz_from_rows, (rows, cov)
    if rounds_compiled(cov.device):
        sources = tuple(source.double() for source in sources)
    return newton(*sources, n_iter=n_iter, eps=eps).to(cov.dtype)


def find_linear_root(root: str, linear: str | None = None) -> str:
    """Return the root of a network's linear layers, whose convolutions have `root`.

    Blocks of linear layers are wide. A triangular root of wide blocks costs accuracy, because it
    rotates from step to step: docs/experiments.md, section 11.

    Args:
        root: root of the convolutions.
        linear: chosen root; None: `root`, or "resolvent" in place of "cholesky".
    """
    return linear or ("resolvent" if root == "cholesky" else root)


def newton_schulz(cov: Tensor, n_iter: int, eps: float = 0.0) -> Tensor:
    """Run the iteration of `inverse_sqrt`.

    The first step has Z = I and the last needs no Y: 3 n - 3 products rather than 3 n.
    """
    identity = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    cov = torch.add(cov, identity, alpha=eps)
    norm = frobenius_norm(cov)
    Y = cov / norm
    Z = T = 1.5 * identity - 0.5 * Y
    for _ in range(n_iter - 1):
        Y = multiply(Y, T)
        T = multiply(Z, Y, identity, beta=1.5, alpha=-0.5)
        Z = multiply(T, Z)
    return Z * norm.rsqrt()


def newton_schulz_from_rows(rows: Tensor, cov: Tensor, eps: float, n_iter: int) -> Tensor:
    """Run the iteration for A = X^T X + eps I, X = rows / sqrt(M), on the M x M side.

    Every polynomial of A has the form c I + X^T H X. A product of two needs only K = X X^T:

        (c I + X^T H X)(c' I + X^T H' X) = c c' I + X^T (c H' + c' H + H K H') X

    The iteration runs on pairs (c, H), at 2 M^3 multiplications a product rather than F^3.

    Args:
        rows: (G, M, F), centred, float32 or float64. Cheaper than `newton_schulz` for 2 M < F.
        cov: (G, F, F), the mean square of `rows`, for its scale: D is NaN if `cov` overflows.
        eps: added to the diagonal, in units of variance; above 0.
        n_iter: steps, at least 1.

    Returns:
        (G, F, F).
    """
    X = rows / rows.shape[1] ** 0.5
    K = multiply(X, X.mT)
    variances = cov.detach().diagonal(dim1=-2, dim2=-1)
    largest = variances.amax(-1)[:, None, None] + eps  # squares of variances overflow
    trace = K.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] / largest * (eps / largest)
    square = (K / largest).square().sum((-2, -1), keepdim=True)
    norm = largest * (X.shape[2] * (eps / largest) ** 2 + 2 * trace + square).sqrt()  # |A|_F

    def compose(p: Pair, q: Pair) -> Pair:
        product = multiply(multiply(p[1], K), q[1])
        return p[0] * q[0], p[0] * q[1] + q[0] * p[1] + product

    def damp(p: Pair) -> Pair:  # T = (3 I - P) / 2
        return 1.5 - 0.5 * p[0], -0.5 * p[1]

    Y = eps / norm, torch.eye(K.shape[-1], dtype=K.dtype, device=K.device) / norm
    Z = T = damp(Y)
    for _ in range(n_iter - 1):
        Y = compose(Y, T)
        T = damp(compose(Z, Y))
        Z = compose(T, Z)
    scale = norm.rsqrt()
    product = multiply(multiply(X.mT, Z[1]), X * scale)  # Z[1] * scale would underflow
    identity = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
    return Z[0] * scale * identity + product


class _SymmetricGradient(torch.autograd.Function):
    """Return a symmetric matrix; average its gradient and the transposed gradient."""

    @staticmethod
    def forward(ctx: Any, cov: Tensor) -> Tensor:
        return cov.view_as(cov)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad + grad.mT) / 2


def newton_schulz_response(eigenvalues: Tensor, n_iter: int) -> Tensor:
    """Return what `n_iter` steps make of the eigenvalues of A / |A|_F, elementwise."""
    z = torch.ones_like(eigenvalues)
    for _ in range(n_iter):
        z = z * (1.5 - 0.5 * eigenvalues * z.square())
    return z
