"""Batched A^(-1/2) of symmetric positive definite matrices by coupled Newton-Schulz.

`inverse_sqrt` takes A itself; `inverse_sqrt_from_rows` gives the same result from fewer rows than
features, without ever multiplying two matrices of A's size.
"""

from __future__ import annotations

import torch

from .cholesky import inverse_cholesky
from .matmul import identity
from .resolvent import inverse_sqrt_by_resolvents
from .spectrum import RootOfMatrix, RootOfRows, root_of_matrix

MAX_STEPS = 15  # of Newton-Schulz, in float32
ROOTS = ("newton", "resolvent", "cholesky")
Pair = tuple[torch.Tensor, torch.Tensor]


def inverse_sqrt(
    cov: torch.Tensor, n_iter: int = 5, root: str = "newton", eps: float = 0.0
) -> torch.Tensor:
    """Approximate A^(-1/2) with `n_iter` steps of the coupled Newton-Schulz iteration.

        A = cov + eps I

        Y0 = A / |A|_F,  Z0 = I;   T = (3 I - Z Y) / 2,  Y <- Y T,  Z <- T Z;   D = Z / sqrt(|A|_F)

    Z Y -> I, Y -> (A/|A|_F)^(1/2), Z -> (A/|A|_F)^(-1/2). All eigenvalues of A/|A|_F lie in (0, 1],
    where the iteration converges: quadratically near 1, while a small eigenvalue l only grows by
    2.25 a step. Stopping after five steps therefore multiplies a direction by at most
    1.5^5 = 7.6 / sqrt(|A|_F): directions under about 0.02 |A|_F are *not* whitened but damped, a
    soft floor that is part of the published regularisation (with an exact root at the same eps,
    training diverges).
    All iterates are polynomials of A, so they are symmetric and commute, and D is symmetric.

    In float32 rounding grows with every step once the root has converged. Up to MAX_STEPS the
    result is good to 1e-2 for the worst covariances met in training (eps 1e-5, wide layers), at 20
    it is not, and at 30 it is NaN; five steps are good to 1e-6.

    The first step has Z = I and the last needs no Y: 3 n - 3 products rather than 3 n.

    Args:
        cov: (G, F, F), symmetric positive semidefinite, float32 or float64.
        n_iter: steps, at least 1; in float32 at most MAX_STEPS.
        root: "newton" for the above, symmetric; "resolvent" for `inverse_sqrt_by_resolvents`, the
            same within 0.75 %, for the price of a matrix inverse; "cholesky" for
            `inverse_cholesky`, lower triangular, with the floor of so many steps.
        eps: added to the diagonal, in units of variance.

    Returns:
        (G, F, F).

    Raises:
        ValueError: `n_iter` is below 1, or for "resolvent" above MAX_STEPS.

    Source: Ye et al., ICLR 2020, section 3.2; Higham, Functions of Matrices, 2008, eq. 6.35.
    """
    if n_iter < 1:
        raise ValueError(f"n_iter must be at least 1, got {n_iter}")
    if root == "cholesky":
        return inverse_cholesky(cov, n_iter, eps)
    if root == "resolvent":
        return inverse_sqrt_by_resolvents(cov, n_iter, eps)
    unit = identity(cov)
    cov = torch.add(cov, unit, alpha=eps)
    if not _decomposes(cov):
        return newton_schulz(cov, n_iter)
    if cov.requires_grad:
        return RootOfMatrix.apply(cov, n_iter)
    return root_of_matrix(cov, n_iter)[0]  # what torch.func transforms as well


def newton_schulz(cov: torch.Tensor, n_iter: int) -> torch.Tensor:
    """The iteration itself, as `inverse_sqrt` describes it."""
    norm = torch.linalg.matrix_norm(cov, keepdim=True)
    unit = identity(cov)
    Y = cov / norm
    Z = T = 1.5 * unit - 0.5 * Y
    for _ in range(n_iter - 1):
        Y = Y @ T
        T = torch.baddbmm(unit, Z, Y, beta=1.5, alpha=-0.5)
        Z = T @ Z
    return Z * norm.rsqrt()


def inverse_sqrt_from_rows(rows: torch.Tensor, eps: float, n_iter: int = 5) -> torch.Tensor:
    """`inverse_sqrt(rows^T rows / M + eps I)`, computed on the M x M side.

    With X = rows / sqrt(M), every polynomial of A = eps I + X^T X has the form c I + X^T H X, and a
    product of two of them needs only K = X X^T:

        (c I + X^T H X)(c' I + X^T H' X) = c c' I + X^T (c H' + c' H + H K H') X

    So the iteration runs on pairs (c, H), at 2 M^3 multiplications a product rather than F^3.

    Args:
        rows: (G, M, F), centred, float32 or float64; cheaper than `inverse_sqrt` for 2 M < F.
        eps: added to the diagonal, in units of variance; above 0.
        n_iter: steps, at least 1.

    Returns:
        (G, F, F).
    """
    rows = rows / rows.shape[1] ** 0.5
    if _decomposes(rows):
        return RootOfRows.apply(rows, eps, n_iter)
    return newton_schulz_from_rows(rows, eps, n_iter)


def newton_schulz_from_rows(X: torch.Tensor, eps: float, n_iter: int) -> torch.Tensor:
    """The iteration itself, for A = eps I + X^T X, as `inverse_sqrt_from_rows` describes it."""
    features = X.shape[2]
    K = X @ X.mT
    trace = K.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    square = K.square().sum((-2, -1), keepdim=True)
    norm = (features * eps**2 + 2 * eps * trace + square).sqrt()  # |A|_F

    def multiply(p: Pair, q: Pair) -> Pair:
        return p[0] * q[0], p[0] * q[1] + q[0] * p[1] + p[1] @ K @ q[1]

    def damp(p: Pair) -> Pair:  # T = (3 I - P) / 2
        return 1.5 - 0.5 * p[0], -0.5 * p[1]

    Y = eps / norm, identity(K) / norm
    Z = T = damp(Y)
    for _ in range(n_iter - 1):
        Y = multiply(Y, T)
        T = damp(multiply(Z, Y))
        Z = multiply(T, Z)
    scale = norm.rsqrt()
    product = X.mT @ (Z[1] * scale) @ X
    return (Z[0] * scale) * identity(product) + product


def _decomposes(matrix: torch.Tensor) -> bool:
    """Whether eigenvalues are found in less time than the iteration takes: not on a GPU."""
    return matrix.device.type == "cpu"
