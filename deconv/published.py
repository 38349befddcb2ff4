"""State dicts of earlier versions of the layers."""

from __future__ import annotations

import torch

from .ops.inverse_sqrt import newton_schulz_response

STEPS = 500  # the smallest eigenvalues, which matter least, are the slowest to settle


def covariance_behind(
    whiten: torch.Tensor, n_iter: int, root: str = "newton", eps: float = 0.0
) -> torch.Tensor:
    """The covariance that `inverse_sqrt` makes `whiten` of.

    An eigenvalue l of A = Cov + eps I becomes d = f(l), which falls with l; from an l that is too
    small by a factor f(l) is too large by up to the root of it, so l (f(l) / d)^2 is nearer.

    Args:
        whiten: (G, F, F), from `inverse_sqrt`, or an average of such.
        n_iter, root, eps: as there.

    Returns:
        (G, F, F), float64.
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
