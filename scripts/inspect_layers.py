"""Show the whitening of a trained network layer by layer, as a table and as a figure.

    python scripts/inspect_layers.py RUN/checkpoint.pth.tar layers.png
    python scripts/inspect_layers.py RUN/checkpoint.pth.tar layers.png --data DIR --images 256

The figure has four rows:

1. Filters of the first layer: as learned, W, and as applied to the raw image, W D.
2. Whitening kernels, rows of the symmetric root. Each kernel makes one pixel white. A kernel is a
   centre against its surround, as in the paper and in the retina. The Cholesky factor is a rotation
   of the symmetric root, and weighs the centre against one half of the surround.
3. Correlation of the features of one block of the last convolution, before and after whitening.
4. Eigenvalues of each layer's covariance; whiteness before and after (`deconv.whiteness`).

Exit code: 2 bad input.
"""

from __future__ import annotations

import sys
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
from scripts.trained_network import load_network, make_parser, read_images
from util.cli.parser import report_errors
from util.tracking.plots import draw_filters

LEGEND = """\
before, after: whiteness; 1: all directions vary alike, 1 / features: only one direction varies
under floor: part of the directions that vary so little that whitening leaves them small"""
KERNELS = 3  # whitening kernels drawn, one per input channel


def main(argv: Sequence[str] | None = None) -> None:
    out, purpose = "figure to write, .png or .pdf", "number of test images"
    parser = make_parser("inspect_layers.py", __doc__.splitlines()[0], out, 128, purpose)
    args = parser.parse_args(argv)
    with report_errors(parser, ValueError):
        trained = load_network(args.checkpoint, use_ema=args.use_ema)
        first = find_first_layer(trained.network)
        images = read_images(trained, args.data, args.images)
        rows = whiteness(trained.network, images)
        print(f"{rows}\n{LEGEND}")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        title = f"{trained.flags.arch}, {len(images)} images"
        last = find_last_convolution(trained.network, rows)
        draw(first, last, rows, title).savefig(args.out, dpi=120)
    print(f"figure: {args.out}")


def find_first_layer(network: nn.Module) -> FastDeconv:
    """Return the first convolution; refuse one that does not whiten."""
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    if not isinstance(first, FastDeconv):
        raise ValueError("the network begins with no deconvolution: train with --deconv True")
    return first


def find_last_convolution(network: nn.Module, rows: Whiteness) -> LayerWhiteness:
    """Return the row of the last convolution; the first convolution has one at least."""
    convolutions = [r for r in rows if isinstance(network.get_submodule(r.name), FastDeconv)]
    return convolutions[-1]


def draw(first: FastDeconv, last: LayerWhiteness, rows: Whiteness, title: str) -> Figure:
    """Draw filters, whitening kernels, correlations of the last layer, and all layers."""
    figure = Figure(figsize=(11, 18), layout="constrained")
    figure.suptitle(title)
    top, upper, lower, bottom = figure.subfigures(4, 1, height_ratios=(4, 3, 4, 4))
    filters = {
        "first layer as learned, W": first.weight,
        "as applied to the image, W D": first.whitened_weight(),
    }
    for axes, (name, weight) in zip(top.subplots(1, 2), filters.items(), strict=True):
        axes.imshow(draw_filters(weight).permute(1, 2, 0).numpy())
        axes.set(title=name, xticks=[], yticks=[])
    kernels = centre_kernels(first)[:KERNELS]
    for channel, axes in enumerate(upper.subplots(1, len(kernels), squeeze=False).flat):
        draw_kernel(axes, kernels[channel], f"whitening kernel, channel {channel}")
    draw_correlations(lower, last)
    left, right = bottom.subplots(1, 2)
    draw_spectra(left, rows)
    draw_whiteness(right, rows)
    return figure


@torch.no_grad()
def centre_kernels(layer: FastDeconv) -> Tensor:
    """Return the kernel (C, h, w) of each input channel that whitens the channel's middle pixel.

    The kernels are rows of the symmetric root, even where the layer uses the Cholesky factor.
    """
    layer = copy(layer)
    layer.root = "newton"
    kernels = layer.whitening_kernels()  # groups*C*T, C, h, w
    taps, channels = layer.blocks.taps, layer.blocks.channels
    middle = kernels[taps // 2 :: taps]
    return torch.stack([kernel[n % channels] for n, kernel in enumerate(middle)])


def draw_kernel(axes: Axes, kernel: Tensor, title: str) -> None:
    """Draw one kernel (h, w); write the values into a small one."""
    limit = kernel.abs().max().item()
    axes.imshow(kernel.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    if kernel.numel() <= 49:
        for (row, column), value in np.ndenumerate(kernel.numpy()):
            color = "white" if abs(value) > 0.6 * limit else "black"
            style = {"ha": "center", "va": "center", "fontsize": 8, "color": color}
            axes.text(column, row, f"{value:.2g}", **style)
    axes.set(title=title, xticks=[], yticks=[])


def draw_correlations(figure: SubFigure, row: LayerWhiteness) -> None:
    """Draw the correlation of one block's features before and after whitening."""
    both = figure.subplots(1, 2)
    for axes, cov, when in zip(both, row.covariances, ("before", "after"), strict=True):
        image = axes.imshow(correlate(cov).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        text = f"{row.name or 'the layer'}: correlation of {row.features} features, {when}"
        axes.set(title=text, xticks=[], yticks=[])
    figure.colorbar(image, ax=both, shrink=0.8)


def correlate(cov: Tensor) -> Tensor:
    """Return the mean correlation (F, F) of covariances (G, F, F); constant features give 0."""
    std = cov.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = std[:, None] * std[..., None]
    return torch.where(scale == 0, 0.0, cov / scale).mean(0)


def draw_spectra(axes: Axes, rows: Whiteness) -> None:
    """Draw the eigenvalues of each layer, largest first, divided by their norm."""
    colors = colormaps["viridis"].resampled(len(rows))
    for number, row in enumerate(rows):
        values = row.spectrum.clamp(min=0).mean(0).flip(0)
        x = np.linspace(0, 1, len(values))
        y = (values / values.norm()).numpy()
        axes.plot(x, y, color=colors(number), linewidth=1, label=row.name or "(all)")
    axes.set(yscale="log", ylim=(1e-6, 2), xlabel="rank of the eigenvalue / number of features")
    axes.set(title="eigenvalues of each covariance / norm of the spectrum")
    axes.grid(alpha=0.3)
    if len(rows) <= 12:
        axes.legend(frameon=False, fontsize=8)


def draw_whiteness(axes: Axes, rows: Whiteness) -> None:
    """Draw the whiteness of each layer, and the part of its directions under the floor."""
    positions = range(len(rows))
    axes.plot(positions, [row.before for row in rows], "o--", color="#666666", label="before")
    axes.plot(positions, [row.after for row in rows], "o-", color="#1f77b4", label="after")
    floor = [row.under_floor for row in rows]
    axes.plot(positions, floor, "x:", color="#d62728", label="under floor")
    title = "whiteness; part of the directions under the floor"
    axes.set(ylim=(0, 1.05), xlabel="layer", title=title)
    if len(rows) <= 24:
        axes.set_xticks(list(positions), labels=[row.name for row in rows], rotation=90, fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
