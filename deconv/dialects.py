"""Running statistics of published checkpoints, read for the layers of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops.blocks import Blocks
from .ops.inverse_sqrt import newton_schulz, newton_schulz_response

MATRIX_NAMES = ("running_deconv", "running_cov_isqrt")  # D, of 2019 and 2020, and of the follow-up
HALVINGS = 45  # of the intervals that hold eigenvalues and their norm
TOLERANCE = 1e-5  # accepted error of D, relative to its norm


def read_published(layer: Any, state: dict[str, Any], prefix: str) -> None:
    """Replace published running statistics in `state` by those of a layer that whitens.

    The evaluation of the layer then equals the published one.

    Args:
        layer: a `Whitening`.
        state: state_dict with the buffers `running_mean` and `running_deconv`, or
            `running_cov_isqrt`, at `prefix`; changed in place. Without them nothing happens.
        prefix: name of the layer in `state`, with a dot at its end.

    Raises:
        ValueError: the layer cannot equal the published one; the message says how it could.
    """
    name = next((name for name in MATRIX_NAMES if prefix + name in state), None)
    if name is None:
        return
    whiten, mean = state[prefix + name], state.get(f"{prefix}running_mean")
    if mean is None:
        raise ValueError(f"there is {name} but no running_mean")
    _check_layer(layer, tuple(whiten.shape), name)
    mean = _find_patch_mean(layer, mean)
    whiten = whiten.reshape(-1, *whiten.shape[-2:])
    cov = covariance_behind(whiten, layer.n_iter, layer.eps).to(layer.running_cov_joint.dtype)
    again = newton_schulz(cov, layer.n_iter, layer.eps)
    error = ((again - whiten).norm() / whiten.norm()).item()
    if not error <= TOLERANCE:
        raise ValueError(
            f"no covariance gives {name} within {TOLERANCE} after n_iter={layer.n_iter} steps with "
            f"eps={layer.eps} (error {error:.1g}): construct the layer with the published values, "
            "or use deconv.published, which keeps the matrix itself"
        )
    del state[prefix + name]
    state[f"{prefix}running_mean"], state[f"{prefix}running_cov_joint"] = mean, cov
    state.setdefault(f"{prefix}num_batches_tracked", torch.tensor(1))
    if layer.freeze:
        state.setdefault(f"{prefix}freeze_steps", torch.tensor(0))


def _check_layer(layer: Any, shape: tuple[int, ...], name: str) -> None:
    """Refuse a layer whose options differ from those of the published one, by the shape of D."""
    blocks: Blocks = layer.blocks
    layout = "contiguous" if hasattr(layer, "in_features") else "interleaved"
    wanted: dict[str, Any] = {"root": "newton", "track_running_stats": True}
    if blocks.count > 1:
        wanted |= {"shared": True, "layout": layout}
    faults = {key: value for key, value in wanted.items() if getattr(layer, key) != value}
    if layer.axes != ("joint",):
        faults["mode"] = 5
    side = shape[-1]
    if side != blocks.features and side % blocks.taps == 0 and len(shape) == 2:
        faults["block"] = side // blocks.taps
    if faults:
        options = ", ".join(f"{key}={value!r}" for key, value in faults.items())
        raise ValueError(f"published {name} needs a layer with {options}")
    groups = () if blocks.groups == 1 else (blocks.groups,)
    if shape != (*groups, blocks.features, blocks.features):
        raise ValueError(
            f"published {name} has shape {shape}, which no layer with {blocks.groups} groups of "
            f"{blocks.channels} channels and {blocks.taps} taps has"
        )


def _find_patch_mean(layer: Any, mean: Tensor) -> Tensor:
    """Return a published mean for each feature of a patch, (groups * C*T,)."""
    blocks: Blocks = layer.blocks
    if mean.shape == (1, blocks.size, 1, 1):  # of channels c mod G, before padding
        if layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice):
            raise ValueError(
                f"the running_mean of 2019 was subtracted before zero padding, padding is "
                f"{layer.padding}: use deconv.published.FastDeconv2019"
            )
        return mean.flatten().repeat(blocks.count).repeat_interleave(blocks.taps)
    if mean.shape != (blocks.groups * blocks.features,):
        raise ValueError(
            f"published running_mean has shape {(*mean.shape,)}, "
            f"not ({blocks.groups * blocks.features},)"
        )
    return blocks.expand(mean)


def covariance_behind(whiten: Tensor, n_iter: int, eps: float = 0.0) -> Tensor:
    """Return the covariance whose root by Newton-Schulz is `whiten`.

    An eigenvalue l of A = Cov + eps I has the root d = f(l / |A|) / sqrt(|A|), and f decreases.
    Bisection finds l / |A| for a norm |A|, and the norm for which these ratios have norm 1. Means
    of several roots may need ratios a little below 0, where f goes on.

    Args:
        whiten: (G, F, F), from `newton_schulz`, or an average of such matrices.
        n_iter: number of steps.
        eps: added to the diagonal, in units of variance.

    Returns:
        (G, F, F), float64. Its root differs from `whiten` if no covariance has this root.

    Example:
        >>> covariance_behind(newton_schulz(cov, 5, 1e-2), 5, 1e-2)  # cov
    """
    whiten = whiten.double()
    roots, basis = torch.linalg.eigh((whiten + whiten.mT) / 2)
    roots = roots.clamp(min=torch.finfo(torch.float32).tiny)

    def find_ratios(scale: Tensor) -> Tensor:  # l / |A| for sqrt(|A|)
        low, high = torch.full_like(roots, -0.01), torch.ones_like(roots)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            below = newton_schulz_response(middle, n_iter) > roots * scale
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    low = 1 / roots.amax(-1, keepdim=True)
    high = 1.5 ** (n_iter + 1) / roots.amin(-1, keepdim=True)
    for _ in range(HALVINGS):
        scale = (low * high).sqrt()
        small = find_ratios(scale).norm(dim=-1, keepdim=True) > 1
        low, high = torch.where(small, scale, low), torch.where(small, high, scale)
    values = find_ratios(high) * high.square()
    return (basis * (values - eps)[..., None, :]) @ basis.mT
