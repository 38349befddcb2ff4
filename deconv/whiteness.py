"""Measure how white the input of each layer is, before and after whitening."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import reduce
from typing import Any

import torch
from torch import nn

from .ops.blocks import Blocks
from .ops.covariance import mean_and_covariance
from .ops.patches import sample
from .ops.precision import full_precision
from .table import align
from .whitening import Matrices, Whitening


@dataclass(frozen=True)
class LayerWhiteness:
    """Whiteness of the input of one layer, from the eigenvalues l of its covariances.

    Args:
        name: name of the layer in the model, "" for the model itself.
        features: F, the side of a covariance.
        patches: number of patches in the covariances.
        before: whiteness of the patches, (sum l)^2 / (F sum l^2), averaged over the matrices of the
            layer: 1 if all directions vary alike, 1/F if one direction has all the variance. F
            times the whiteness is the effective number of directions. The inverse minus 1 is the
            statistic of John's test of sphericity.
        after: whiteness of the whitened patches.
        condition: ratio of the largest to the smallest eigenvalue, eps added to both; the largest
            ratio of all matrices.
        under_floor: fraction of directions below the soft floor, which stay small. Their eigenvalue
            of Cov + eps I is below 1.5^(-2 n_iter) of its norm.
        spectrum: eigenvalues of all matrices, (G, F), ascending, in units of variance.
        covariances: of the patches before and after, (G, F, F) each, on the model's device.
        error: the reason why the layer cannot be measured, or "". All metrics are then NaN.
    """

    name: str
    features: int
    patches: int
    before: float
    after: float
    condition: float
    under_floor: float
    spectrum: torch.Tensor = field(repr=False, compare=False)
    covariances: tuple[torch.Tensor, torch.Tensor] = field(repr=False, compare=False)
    error: str = ""


class Whiteness(tuple[LayerWhiteness, ...]):
    """Rows of `whiteness`, one per layer; `str` formats them as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        lines = [("layer", "features", "patches", "before", "after", "condition", "under floor")]
        for row in self:
            counts = str(row.features), str(row.patches)
            metrics = f"{row.before:.3f}", f"{row.after:.3f}", f"{row.condition:.3g}"
            lines.append((row.name or "(all)", *counts, *metrics, f"{100 * row.under_floor:.0f} %"))
        errors = [f"\n{row.name or '(all)'}: {row.error}" for row in self if row.error]
        return align(lines) + "".join(errors)

    def scalars(self) -> dict[str, float]:
        """Return the metrics by names such as "before/layer1.0.conv1", for a log."""
        names = [f.name for f in fields(LayerWhiteness) if f.type == "float"]
        return {f"{name}/{row.name}": getattr(row, name) for row in self for name in names}


@torch.no_grad()
def whiteness(model: nn.Module, batch: torch.Tensor) -> Whiteness:
    """Measure how white the input of each deconvolution layer is, before and after whitening.

    The model runs once in evaluation and is not changed. Each layer whitens by its running
    statistics, or by the batch if it has none. All modes are measured by the joint covariance of
    the features of a block. Mode 3 whitens only across channels, mode 2 only across pixels. For a
    layer that is called several times, the first input counts. The batch is that of this rank
    alone.

    Args:
        model: a model whose forward takes `batch`, or a single layer.
        batch: (N, ...) inputs, on the device of the model. With few patches per feature, the
            covariance of one batch misses some directions, as in training.

    Returns:
        One row per layer that ran, in the order of the model. Metrics of a layer with non-finite
        input are NaN. A layer that cannot be measured has NaN as well, and `error` is the reason.

    Example:
        >>> layer = FastDeconv(3, 8, 3)
        >>> images = torch.rand(16, 3, 32, 32)
        >>> (row,) = whiteness(layer, images)
        >>> row.after > row.before
        True
    """
    rows: dict[str, LayerWhiteness] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Whitening)}
    flags = [(module, module.training) for module in model.modules()]
    shares = [(layer, layer.sync_stats) for layer in layers.values()]
    if not layers:
        return Whiteness()

    def make_hook(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in rows:
                rows[name] = _try_layer(name, layer, args[0] if args else kwargs["input"])

        return hook

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(make_hook(name), with_kwargs=True)
            hooks.callback(hook.remove)
            layer.sync_stats = False  # other ranks may not run the model now
        try:
            model.eval()(batch)
        finally:
            for module, training in flags:
                module.training = training
            for layer, share in shares:
                layer.sync_stats = share
    return Whiteness(rows[name] for name in layers if name in rows)


def _try_layer(name: str, layer: Whitening, x: torch.Tensor) -> LayerWhiteness:
    """Measure one layer on the input `x` of its forward; report an error in the row."""
    try:
        return _measure_layer(name, layer, x)
    except Exception as error:  # a diagnostic never ends a training
        nan, features, matrices = float("nan"), layer.blocks.features, layer.blocks.matrices
        spectrum = torch.full((matrices, features), nan, dtype=torch.float64)
        cov = spectrum.to(layer.weight.device)[:, None].expand(-1, features, -1)
        metrics = {"before": nan, "after": nan, "condition": nan, "under_floor": nan}
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return LayerWhiteness(
            name, features, 0, **metrics, spectrum=spectrum, covariances=(cov, cov), error=text
        )


def _measure_layer(name: str, layer: Whitening, x: torch.Tensor) -> LayerWhiteness:
    """Measure one layer on the input `x` of its forward, in float64 from its covariances on.

    Eigenvalues of rank-deficient covariances do not converge in float32.
    """
    with full_precision(x.device):
        x = layer.centre_input(layer.prepare_input(x))
        sampling, blocks = layer.choose_patches(x)
        patches = sample(x, sampling)
        if not patches.samples:
            raise ValueError("the batch has no patches")
        cov = mean_and_covariance(patches, blocks).cov.double()
        if layer.track_running_stats:
            _, whiten = layer.running_whitening()
        else:
            *_, whiten = layer.batch_whitening(x)
        finite = cov.isfinite().all(-1).all(-1)[:, None]  # eigvalsh fails on the others
        spectrum = torch.linalg.eigvalsh(torch.where(finite[..., None], cov, 0.0))
        spectrum = torch.where(finite, spectrum, torch.nan)
        matrix = _join_axes(whiten, blocks).double()
        after = matrix @ cov @ matrix.mT
    values = spectrum.clamp(min=0) + layer.eps
    floor = 1.5 ** (-2 * layer.n_iter) * values.norm(dim=-1, keepdim=True)
    under = torch.where(values.isnan(), torch.nan, (values < floor).double())
    return LayerWhiteness(
        name,
        blocks.features,
        patches.samples,
        before=_compute_whiteness(cov),
        after=_compute_whiteness(after),
        condition=(values[:, -1] / values[:, 0]).max().item(),
        under_floor=under.mean().item(),
        spectrum=spectrum.cpu(),
        covariances=(cov, after),
    )


def _join_axes(whiten: Matrices, blocks: Blocks) -> torch.Tensor:
    """Combine the whitening matrices of all axes into (G, F, F), on the features of a block."""
    matrices = []
    for axis, matrix in whiten.items():
        if axis == "channel":
            matrix = _kron(matrix, _identities(blocks.taps, matrix))
        elif axis == "pixel":
            matrix = _kron(_identities(blocks.size, matrix), matrix)
        matrices.append(matrix)
    return reduce(lambda joined, matrix: matrix @ joined, matrices)


def _identities(side: int, like: torch.Tensor) -> torch.Tensor:
    """Return identities (G, side, side), one per matrix of `like`."""
    return torch.eye(side, dtype=like.dtype, device=like.device).expand(len(like), -1, -1)


def _kron(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the Kronecker products of (G, b, b) and (G, t, t), (G, b * t, b * t)."""
    return torch.einsum("gab,gtu->gatbu", left, right).flatten(3).flatten(1, 2)


def _compute_whiteness(cov: torch.Tensor) -> float:
    """Return the mean whiteness of covariances (G, F, F); 1 for a covariance of zeros."""
    trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)
    square = cov.square().sum((-2, -1)) * cov.shape[-1]
    return torch.where(square == 0, 1.0, trace.square() / square).mean().item()
