"""How white the input of each layer is, before whitening and after it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, fields

import torch
from torch import nn

from .ops.blocks import Blocks
from .ops.covariance import mean_and_covariance
from .ops.patches import sample
from .table import align
from .whitening import Matrices, Whitening, full_precision


@dataclass(frozen=True)
class LayerWhiteness:
    """The patches that one layer looks at, by the eigenvalues l of their covariances.

    Args:
        name: of the layer in the network, "" for the network itself.
        features: F, the side of a covariance.
        patches: that were looked at.
        before: whiteness of the patches, (sum l)^2 / (F sum l^2), averaged over the layer's
            matrices: 1 where they vary alike in all directions, 1/F where in a single one. (F times
            it is the number of directions that count; 1 / it - 1 is John's test of sphericity.)
        after: the same of the whitened patches.
        condition: largest eigenvalue / smallest, eps added to both; the worst of the matrices.
        under_floor: the share of directions under the soft floor of `n_iter` steps, eigenvalues of
            Cov + eps I less than 1.5^(-2 n_iter) of its norm: whitening leaves them small.
        spectrum: eigenvalues of all matrices (G, F), the smallest first, in units of variance.
        covariances: of the patches before and after, (G, F, F) each, on the device of the network.
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


class Whiteness(tuple[LayerWhiteness, ...]):
    """A row for each layer, which print as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        lines = [("layer", "features", "patches", "before", "after", "condition", "under floor")]
        for row in self:
            shares = f"{row.before:.3f}", f"{row.after:.3f}"
            worst = f"{row.condition:.3g}", f"{100 * row.under_floor:.0f} %"
            counts = str(row.features), str(row.patches)
            lines.append((row.name or "(all)", *counts, *shares, *worst))
        return align(lines)

    def scalars(self) -> dict[str, float]:
        """The figures by names such as "before/layer1.0.conv1", for a log."""
        names = [f.name for f in fields(LayerWhiteness) if f.type == "float"]
        return {f"{name}/{row.name}": getattr(row, name) for row in self for name in names}


@torch.no_grad()
def whiteness(model: nn.Module, batch: torch.Tensor) -> Whiteness:
    """How white the inputs of a network's deconvolution layers are, and what whitening makes of it.

    The network runs once, in evaluation, and is left as it is: each layer whitens by its running
    statistics, or by the batch where it has none. All modes are judged by the joint covariance of
    the features of a block, which mode 3 does not whiten beyond single pixels and mode 2 not beyond
    single channels. A layer that runs several times is judged by its first input.

    Args:
        model: whose forward takes `batch`; may itself be a layer.
        batch: (N, ...) inputs, on the device of the model. As in training the covariances are those
            of one batch: with few patches for each feature some directions are not seen at all.

    Returns:
        A row for each layer that ran, in the order of the network. Metrics of a layer whose input
        is not finite are NaN.
    """
    found: dict[str, LayerWhiteness] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Whitening)}
    before = [(module, module.training) for module in model.modules()]
    if not layers:
        return Whiteness()

    def look(name: str, layer: Whitening, x: torch.Tensor) -> None:
        if name not in found:
            found[name] = _judge(name, layer, x)

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(
                lambda layer, args, name=name: look(name, layer, args[0])
            )
            hooks.callback(hook.remove)
        try:
            model.eval()(batch)
        finally:
            for module, training in before:
                module.training = training
    return Whiteness(found[name] for name in layers if name in found)


def _judge(name: str, layer: Whitening, x: torch.Tensor) -> LayerWhiteness:
    """`x`: as the layer's forward takes it."""
    with full_precision(x.device):
        x = layer.prepare_input(x)
        sampling, blocks = layer.choose_patches(x)
        patches = sample(x, sampling)
        cov = mean_and_covariance(patches, blocks).cov
        if layer.track_running_stats:
            _, whiten = layer.running_whitening()
        else:
            *_, whiten = layer.batch_whitening(x)
        finite = cov.isfinite().all(-1).all(-1)[:, None]  # others have no decomposition
        spectrum = torch.linalg.eigvalsh(torch.where(finite[..., None], cov, 0.0))
        spectrum = torch.where(finite, spectrum, torch.nan)
        matrix = _join(whiten, blocks)
        after = matrix @ cov @ matrix.mT
    values = spectrum.clamp(min=0) + layer.eps
    floor = 1.5 ** (-2 * layer.n_iter) * values.norm(dim=-1, keepdim=True)
    under = torch.where(values.isnan(), torch.nan, (values < floor).double())
    return LayerWhiteness(
        name,
        blocks.features,
        patches.count,
        before=_measure(cov),
        after=_measure(after),
        condition=(values[:, -1] / values[:, 0]).max().item(),
        under_floor=under.mean().item(),
        spectrum=spectrum.cpu(),
        covariances=(cov, after),
    )


def _join(whiten: Matrices, blocks: Blocks) -> torch.Tensor:
    """All axes' whitening matrices as one (G, F, F) that acts on the features of a block."""
    joined = None
    for axis, matrix in whiten.items():
        if axis == "channel":
            matrix = _kron(matrix, torch.eye(blocks.taps).to(matrix).expand(len(matrix), -1, -1))
        elif axis == "pixel":
            matrix = _kron(torch.eye(blocks.size).to(matrix).expand(len(matrix), -1, -1), matrix)
        joined = matrix if joined is None else matrix @ joined
    return joined


def _kron(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Kronecker products of (G, b, b) and (G, t, t): (G, b * t, b * t)."""
    return torch.einsum("gab,gtu->gatbu", left, right).flatten(3).flatten(1, 2)


def _measure(cov: torch.Tensor) -> float:
    """The whiteness of covariances (G, F, F); 1 where nothing varies."""
    trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1).double()
    square = cov.double().square().sum((-2, -1)) * cov.shape[-1]
    return torch.where(square == 0, 1.0, trace.square() / square).mean().item()
