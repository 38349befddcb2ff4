"""State dicts of earlier versions of the layers."""

from __future__ import annotations

import torch

from .ops.blocks import Blocks
from .ops.spectrum import respond

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
            response = respond(values / norm, n_iter).square() / norm
        values = values * response / squares
    return (basis * (values - eps).clamp(min=0)[..., None, :]) @ basis.mT


def rename_statistics(
    state: dict[str, torch.Tensor], prefix: str, axes: tuple[str, ...], **how: float | str
) -> None:
    """Bring `state`, of a version that averaged D as `running_<axis>`, up to date, in place.

    Args:
        prefix: of the layer's keys.
        axes: of the layer's mode.
        how: n_iter, root and eps of the layer.
    """
    for axis in axes:
        whiten = state.pop(f"{prefix}running_{axis}", None)
        if whiten is not None:
            cov = covariance_behind(whiten, **how)
            state[f"{prefix}running_cov_{axis}"] = cov.to(whiten.dtype)


def deal_back_mean(state: dict[str, torch.Tensor], prefix: str, blocks: Blocks) -> None:
    """Bring `state`, of a version that kept the mean by blocks, up to date, in place.

    It was (G, S, 1, F) or (G, 1, S, F), features of the S blocks that share each matrix; (..., B)
    in mode 3. Now it has the order of the weight's features, (C*T,) or (C,).

    Args:
        prefix: of the layer's keys.
        blocks: of the layer.
    """
    mean = state.get(f"{prefix}running_mean")
    if mean is None or mean.dim() == 1:
        return
    mean = mean.reshape(blocks.groups, blocks.count, -1)
    unit = blocks.unit * mean.shape[2] // blocks.features  # of channels alone in mode 3
    state[f"{prefix}running_mean"] = mean.unflatten(2, (-1, unit)).transpose(1, 2).flatten()
