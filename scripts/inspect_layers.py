"""What whitening does in a trained network, as a table and as a picture.

    python scripts/inspect_layers.py RUN/checkpoint.pth.tar layers.png
    python scripts/inspect_layers.py RUN/checkpoint.pth.tar layers.png --data DIR --pictures 256

The picture shows the filters of the first layer as learned, W, and as the raw picture meets them,
W D; the whitening itself, rows of the symmetric root, each the kernel that makes a pixel white: a
centre against its surround, as in the paper and in the retina (the Cholesky factor, a rotation of
that root, sets it against one half); how the features of a block of the last convolution correlate
before whitening and after it; the eigenvalues of what each layer sees; and how white that is before
and after (`deconv.whiteness`).
Exit code: 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deconv import FastDeconv, whiteness
from deconv.whiteness import LayerWhiteness, Whiteness
from scripts.export import PLACE, read_images, read_saved, rebuild
from util.data.datasets import DataError
from util.errors import CheckpointError, RunError
from util.tracking.plots import draw_filters

MEANING = """\
before, after: how white; 1: all directions vary alike, 1 / features: only one varies
under floor: share of the directions that whitening leaves small, as they hardly vary"""
KERNELS = 3  # whitening kernels drawn: of so many input channels


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        file, saved = read_saved(args.checkpoint)
        flags, network = rebuild(saved, file)
        first = find_first(network)
        pictures = read_images(flags, args.data, args.pictures)
        rows = whiteness(network, pictures)
        print(f"{rows}\n{MEANING}")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        title = f"{flags.arch}, {len(pictures)} pictures"
        draw(first, find_deep(network, rows), rows, title).savefig(args.out, dpi=120)
    except (CheckpointError, DataError, RunError, ValueError, OSError) as error:
        print(f"inspect_layers.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"drawn in {args.out}")


def parse_args(argv: Sequence[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(prog="inspect_layers.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=PLACE)
    parser.add_argument("out", metavar="OUT", type=Path, help="the picture to write, .png or .pdf")
    parser.add_argument("--data", metavar="DIR", help="the pictures (./data, of ImageNet none)")
    parser.add_argument("--pictures", type=int, default=128, help="to look at (128)")
    args = parser.parse_args(argv)
    if args.pictures < 4:
        parser.error(f"argument --pictures: at least 4 are needed, got {args.pictures}")
    return args


def find_first(network: nn.Module) -> FastDeconv:
    """The first layer.

    Raises:
        ValueError: it does not whiten.
    """
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    if not isinstance(first, FastDeconv):
        raise ValueError(
            "the network does not begin with a deconvolution: train with --deconv True"
        )
    return first


def find_deep(network: nn.Module, rows: Whiteness) -> LayerWhiteness:
    """The last convolution.

    Raises:
        ValueError: none of them has run.
    """
    for row in reversed(rows):
        if isinstance(network.get_submodule(row.name), FastDeconv):
            return row
    raise ValueError("no deconvolution layer of the network has seen the pictures")


def draw(first: FastDeconv, deep: LayerWhiteness, rows: Whiteness, title: str) -> Figure:
    """From above: filters, whitening kernels, correlations of a deep layer, all layers."""
    figure = Figure(figsize=(11, 18), layout="constrained")
    figure.suptitle(title)
    above, middle, lower, below = figure.subfigures(4, 1, height_ratios=(4, 3, 4, 4))
    filters = {
        "first layer, W": first.weight,
        "as the picture meets it, W D": first.whitened_weight(),
    }
    for axes, (name, weight) in zip(above.subplots(1, 2), filters.items(), strict=True):
        axes.imshow(draw_filters(weight).permute(1, 2, 0).numpy())
        axes.set(title=name, xticks=[], yticks=[])
    kernels = centre_kernels(first)[:KERNELS]
    for channel, axes in enumerate(middle.subplots(1, len(kernels), squeeze=False).flat):
        draw_kernel(axes, kernels[channel], f"whitening kernel, channel {channel}")
    draw_correlations(lower, deep)
    left, right = below.subplots(1, 2)
    draw_spectra(left, rows)
    draw_whiteness(right, rows)
    return figure


@torch.no_grad()
def centre_kernels(layer: FastDeconv) -> Tensor:
    """For each input channel the kernel (h, w) that makes its middle pixel white from its own.

    By the symmetric root, whatever the layer's own is.
    """
    layer = copy(layer)
    layer.root = "newton"
    kernels = layer.whitening_kernels()  # groups*C*T, C, h, w
    taps, channels = layer.blocks.taps, layer.blocks.channels
    middle = kernels[taps // 2 :: taps]
    return torch.stack([kernel[n % channels] for n, kernel in enumerate(middle)])


def draw_kernel(axes: Axes, kernel: Tensor, title: str) -> None:
    limit = kernel.abs().max().item()
    axes.imshow(kernel.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    if kernel.numel() <= 49:  # small enough for their numbers
        for (row, column), value in np.ndenumerate(kernel.numpy()):
            color = "white" if abs(value) > 0.6 * limit else "black"
            style = {"ha": "center", "va": "center", "fontsize": 8, "color": color}
            axes.text(column, row, f"{value:.2g}", **style)
    axes.set(title=title, xticks=[], yticks=[])


def draw_correlations(figure: SubFigure, row: LayerWhiteness) -> None:
    """Of the features of a block, averaged over the matrices, before and after whitening."""
    both = figure.subplots(1, 2)
    for axes, cov, when in zip(both, row.covariances, ("before", "after"), strict=True):
        picture = axes.imshow(correlate(cov).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        text = f"{row.name or 'the layer'}: correlation of {row.features} features, {when}"
        axes.set(title=text, xticks=[], yticks=[])
    figure.colorbar(picture, ax=both, shrink=0.8)


def correlate(cov: Tensor) -> Tensor:
    """The mean correlation (F, F) of covariances (G, F, F); 0 with what does not vary."""
    spread = cov.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = spread[:, None] * spread[..., None]
    return torch.where(scale == 0, 0.0, cov / scale).mean(0)


def draw_spectra(axes: Axes, rows: Whiteness) -> None:
    """The eigenvalues of each layer, the largest first, in units of their norm."""
    colors = colormaps["viridis"].resampled(len(rows))
    for number, row in enumerate(rows):
        values = row.spectrum.clamp(min=0).mean(0).flip(0)
        share = torch.linspace(0, 1, len(values)) if len(values) > 1 else torch.zeros(1)
        lines = share.numpy(), (values / values.norm()).numpy()
        axes.plot(*lines, color=colors(number), linewidth=1, label=row.name or "(all)")
    axes.set(yscale="log", ylim=(1e-6, 2), xlabel="direction, as a share of all")
    axes.set(title="eigenvalues of what a layer sees, in units of their norm")
    axes.grid(alpha=0.3)
    if len(rows) <= 12:
        axes.legend(frameon=False, fontsize=8)


def draw_whiteness(axes: Axes, rows: Whiteness) -> None:
    places = range(len(rows))
    axes.plot(places, [row.before for row in rows], "o--", color="#666666", label="before")
    axes.plot(places, [row.after for row in rows], "o-", color="#1f77b4", label="after")
    axes.plot(places, [row.under_floor for row in rows], "x:", color="#d62728", label="under floor")
    axes.set(ylim=(0, 1.05), xlabel="layer", title="whiteness; share of directions under the floor")
    if len(rows) <= 24:
        axes.set_xticks(list(places), labels=[row.name for row in rows], rotation=90, fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
