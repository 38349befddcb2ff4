"""Convert running statistics of published checkpoints for the layers of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops.blocks import Blocks
from .ops.inverse_sqrt import newton_schulz, newton_schulz_response

# Buffers of D in the code of 2019 and 2020, and in the follow-up.
MATRIX_NAMES = ("running_deconv", "running_cov_isqrt")
HALVINGS = 45  # bisection steps for eigenvalues and for their norm
TOLERANCE = 1e-5  # accepted error of D, relative to its Frobenius norm


def read_published(layer: Any, state: dict[str, Any], prefix: str) -> None:
    """Replace published running statistics in `state` by those of a `Whitening` layer.

    In evaluation, the layer then computes the output of the published layer.

    Args:
        layer: the `Whitening` that loads `state`.
        state: state_dict, changed in place. It has the published buffers `running_mean` and
            `running_deconv`, or `running_cov_isqrt`, at `prefix`. Without a matrix, the function
            returns at once.
        prefix: name of the layer in `state`, with a trailing dot.

    Raises:
        ValueError: the layer cannot reproduce the published statistics. The message names the
            remedy.
    """
    name = next((name for name in MATRIX_NAMES if prefix + name in state), None)
    if name is None:
        return
    whiten, mean = state[prefix + name], state.get(f"{prefix}running_mean")
    if mean is None:
        raise ValueError(f"the checkpoint has {name} but no running_mean: load both")
    if not (whiten.isfinite().all() and mean.isfinite().all()):
        raise ValueError(f"{name} or running_mean is not finite: load an earlier checkpoint")
    _check_layer(layer, tuple(whiten.shape), name)
    mean = _find_patch_mean(layer, mean)
    whiten = whiten.reshape(-1, *whiten.shape[-2:])
    cov = covariance_behind(whiten, layer.n_iter, layer.eps).to(layer.running_cov_joint.dtype)
    again = newton_schulz(cov, layer.n_iter, layer.eps)
    error = ((again - whiten).norm() / whiten.norm()).item()
    if not error <= TOLERANCE:
        raise ValueError(
            f"no covariance gives {name} within {TOLERANCE} for n_iter={layer.n_iter} and "
            f"eps={layer.eps} (error {error:.1g}): construct the layer with the published values, "
            "or use the layer of deconv.published, which stores D itself"
        )
    del state[prefix + name]
    state[f"{prefix}running_mean"], state[f"{prefix}running_cov_joint"] = mean, cov
    state.setdefault(f"{prefix}num_batches_tracked", torch.tensor(1))
    if layer.freeze:
        state.setdefault(f"{prefix}freeze_steps", torch.tensor(0))


def _check_layer(layer: Any, shape: tuple[int, ...], name: str) -> None:
    """Raise ValueError if the options of the layer do not fit a published D of this shape."""
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
            f"published {name} has shape {shape}, which does not fit a layer with "
            f"{blocks.groups} groups of {blocks.channels} channels and {blocks.taps} taps"
        )


def _find_patch_mean(layer: Any, mean: Tensor) -> Tensor:
    """Expand a published mean to every feature of a patch, (groups * C*T,)."""
    blocks: Blocks = layer.blocks
    if mean.shape == (1, blocks.size, 1, 1):  # of 2019: one mean per channel modulo G
        if layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice):
            raise ValueError(
                f"the code of 2019 subtracts running_mean before zero padding, and padding is "
                f"{layer.padding}: use deconv.published.FastDeconv2019"
            )
        return mean.flatten().repeat(blocks.count).repeat_interleave(blocks.taps)
    if mean.shape != (blocks.groups * blocks.features,):
        raise ValueError(
            f"published running_mean has shape {(*mean.shape,)}, the layer needs "
            f"({blocks.groups * blocks.features},): check block and groups"
        )
    return blocks.expand(mean)


def covariance_behind(whiten: Tensor, n_iter: int, eps: float = 0.0) -> Tensor:
    """Return the covariance from which Newton-Schulz computes `whiten`.

    Newton-Schulz maps an eigenvalue l of A = Cov + eps I to d = f(l / |A|) / sqrt(|A|), with f
    decreasing. An inner bisection finds l / |A| for a given norm |A|. An outer bisection finds the
    norm at which these ratios have norm 1. The mean of several D may need ratios slightly below 0,
    where f is still decreasing.

    Args:
        whiten: D, (G, F, F), from `newton_schulz`, or an average of such matrices.
        n_iter: number of Newton-Schulz steps.
        eps: added to the diagonal (default 0), in units of variance.

    Returns:
        (G, F, F), float64. If no covariance leads to `whiten`, the result leads to another matrix.

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
