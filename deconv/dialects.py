"""Running statistics of published checkpoints, read for the layers of this package."""

from __future__ import annotations

import torch

from .ops.inverse_sqrt import newton_schulz_response

STEPS = 500  # until the smallest eigenvalues, the slowest ones, have converged


def covariance_behind(
    whiten: torch.Tensor, n_iter: int, root: str = "newton", eps: float = 0.0
) -> torch.Tensor:
    """Return the covariance whose `inverse_sqrt` is `whiten`.

    The root maps an eigenvalue l of Cov + eps I to d = f(l), and f decreases. The fixed-point
    iteration l <- l (f(l) / d)^2 inverts it.

    Args:
        whiten: (G, F, F), from `inverse_sqrt`, or an average of such matrices.
        n_iter: number of steps, as for `inverse_sqrt`.
        root: algorithm, as for `inverse_sqrt`.
        eps: added to the diagonal, as for `inverse_sqrt`, in units of variance.

    Returns:
        (G, F, F), float64.

    Example:
        >>> covariance_behind(inverse_sqrt(cov, 5, "newton", 1e-2), 5, "newton", 1e-2)  # cov
    """
    squares, basis = torch.linalg.eigh(whiten.double().mT @ whiten.double())
    squares = squares.clamp(min=torch.finfo(whiten.dtype).tiny)
    values = 1 / squares
    for _ in range(STEPS):
        norm = values.norm(dim=-1, keepdim=True)
        if root == "cholesky":
            response = 1 / (values + 1.5 ** (-2 * n_iter) * norm)
        else:
            response = newton_schulz_response(values / norm, n_iter).square() / norm
        values = values * response / squares
    return (basis * (values - eps).clamp(min=0)[..., None, :]) @ basis.mT
