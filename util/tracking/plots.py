"""Pictures: curves of one run, curves of several runs side by side, the filters of a layer.

Metrics are made without pyplot, so nothing global is touched and no display is needed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torchvision.utils import make_grid

from util.files import atomic_write

QUANTITIES = (("top1", "top-1 accuracy (%)"), ("loss", "loss (mean per picture)"))
# Okabe and Ito's colours, which stay apart for the colour-blind too. Blue is BatchNorm's.
BATCHNORM_COLOR, DECONV_COLORS = "#0072B2", ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^Dvp"
DARKEST = 0.65  # how near to black the last run of a kind is drawn
TRAINING_POINTS = 30  # of one run's training curve in a comparison: the mean of that many parts
MAX_FILTERS, FILTER_PIXELS = 256, 32

Columns = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class RunCurves:
    """What `plot_comparison` draws of one run.

    Args:
        label: for the legend.
        kind: runs of one kind are shades of one colour; those of "bn..." are blue and dashed.
        train, test, batches: columns of `train.log`, `test.log`, `train_batch.log`.
        epoch_steps: optimizer steps of a whole epoch; batches of a higher number overrule it.
    """

    label: str
    kind: str
    train: Columns
    test: Columns
    batches: Columns
    epoch_steps: int


def plot_training(history: Columns, path: str | Path, *, title: str = "") -> None:
    """Accuracy and loss against epochs, on training and test pictures, as a PNG.

    Args:
        history: lists under `epoch`, `train_loss`, `train_top1`, `test_loss`, `test_top1`.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    for axes, (key, label) in zip(figure.subplots(1, 2), QUANTITIES, strict=True):
        for part, color in (("train", DECONV_COLORS[0]), ("test", BATCHNORM_COLOR)):
            style = {"color": color, "marker": "o", "markersize": _marker_size(history["epoch"])}
            axes.plot(history["epoch"], history[f"{part}_{key}"], label=part, **style)
        _dress(axes, "epoch", label)
        axes.legend(frameon=False)
    _save(figure, path)


def plot_comparison(runs: Sequence[RunCurves], path: str | Path) -> None:
    """Accuracy and loss against epochs and against seconds of training, all runs, as a PNG.

    Bold with markers: after each epoch, on test pictures. Thin: in training, smoothed.
    """
    figure = Figure(figsize=(11, 7.5 + 0.12 * len(runs)), layout="constrained")
    figure.suptitle("Test pictures, after each epoch (bold), and training pictures (thin)")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    handles = [_draw_run(grid, run, style) for run, style in zip(runs, _styles(runs), strict=True)]
    for row, (_, label) in zip(grid, QUANTITIES, strict=True):
        _dress(row[0], "epoch", label)
        _dress(row[1], "training time (s)", label)
    labels = [" ".join(run.label.split()) for run in runs]
    columns = max(1, min(len(runs), 120 // (max(map(len, labels)) + 8)))
    place = {"loc": "outside lower center", "ncols": columns, "handlelength": 3}
    legend = figure.legend(handles, labels, frameon=False, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a folder may be called anything, dollars included
    _save(figure, path)


def plot_growth(panels: Mapping[str, tuple[Sequence[float], Columns]], path: str | Path) -> None:
    """Milliseconds of forward and backward against each of several quantities, log-log, as a PNG.

    Args:
        panels: for each quantity its values and, by name, the milliseconds at these; the first two
            names are drawn bold, the first in BatchNorm's colour. All panels have the same names.
    """
    figure = Figure(figsize=(12, 7), layout="constrained")
    grid = figure.subplots(2, math.ceil(len(panels) / 2), sharey=True, squeeze=False)
    colors = (BATCHNORM_COLOR, *DECONV_COLORS, "#666666")
    for axes, (quantity, (values, lines)) in zip(grid.flat, panels.items(), strict=False):
        axes.set(xscale="log", yscale="log")
        for number, (name, times) in enumerate(lines.items()):
            style = {"color": colors[number % len(colors)], "linestyle": "-" if number else "--"}
            style |= {"marker": MARKERS[number % len(MARKERS)], "linewidth": 1 + (number < 2)}
            axes.plot(values, times, label=name, **style)
        _dress(axes, quantity, "milliseconds, both hooks")
        axes.set_xticks(values, labels=[f"{value:g}" for value in values])
        axes.minorticks_off()
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=len(names))
    _save(figure, path)


def plot_losses(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], path: str | Path
) -> None:
    """Training loss against optimizer steps, a panel for each title, logarithmic, as a PNG.

    Args:
        panels: by title, and in a panel by label, pairs of a step and a loss.
    """
    figure = Figure(figsize=(12, 7), layout="constrained")
    grid = figure.subplots(2, math.ceil(len(panels) / 2), squeeze=False)
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        axes.set_yscale("log")
        for number, (label, points) in enumerate(lines.items()):
            steps, losses = zip(*points, strict=True)
            color = (BATCHNORM_COLOR, *DECONV_COLORS)[number]
            axes.plot(steps, losses, label=label, color=color, linewidth=1.2)
        axes.set_title(title, fontsize="medium")
        _dress(axes, "step", "training loss")
        if lines:
            axes.legend(frameon=False, fontsize="small")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    _save(figure, path)


def draw_filters(weight: Tensor) -> Tensor:
    """A picture of convolution kernels, each stretched to black ... white, enlarged, in a grid.

    Args:
        weight: O C h w. One channel is drawn grey, three as red, green and blue, any other number
            as the grey mean of the channels. At most the first 256 kernels are drawn.

    Returns:
        3 H W in [0, 1], on the CPU. NaN and infinity are drawn as zero, a constant kernel black.

    Raises:
        ValueError: `weight` is not of four dimensions.
    """
    if weight.dim() != 4:
        raise ValueError(f"weight must be O C h w to be drawn, got shape {tuple(weight.shape)}")
    kernels = weight.detach()[:MAX_FILTERS].float().cpu().nan_to_num(0.0, 0.0, 0.0)
    if kernels.shape[1] != 3:
        kernels = kernels.mean(dim=1, keepdim=True)  # O 1 h w
    low, high = kernels.amin((1, 2, 3), keepdim=True), kernels.amax((1, 2, 3), keepdim=True)
    pictures = (kernels - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    scale = max(1, FILTER_PIXELS // max(kernels.shape[2:]))
    pictures = F.interpolate(pictures, scale_factor=scale, mode="nearest")
    return make_grid(pictures, nrow=math.ceil(math.sqrt(len(pictures))), pad_value=1.0)


def _draw_run(grid: np.ndarray, run: RunCurves, style: dict) -> Line2D:
    """Draw one run into the 2 x 2 axes; returns a line for the legend."""
    size = _marker_size(run.test["epoch"])
    seconds = np.cumsum([0.0, *run.train["seconds"]])
    for row, (key, _) in zip(grid, QUANTITIES, strict=True):
        for axes, x in zip(row, (run.test["epoch"], seconds[1:]), strict=True):
            (line,) = axes.plot(x, run.test[key], linewidth=2, markersize=size, **style)
        for axes, x in zip(row, _training_positions(run, seconds), strict=True):
            curve = {**style, "marker": "", "alpha": 0.5, "linewidth": 1}
            axes.plot(_smooth(x), _smooth(run.batches[key]), **curve)
    return line


def _training_positions(run: RunCurves, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows of `train_batch.log` lie, in epochs and in seconds of training.

    Args:
        seconds: of training at the start of each epoch, the first one 0.
    """
    finished = np.asarray(run.batches["epoch"], dtype=int) - 1
    batch = np.asarray(run.batches["batch"], dtype=float)
    epochs = finished + batch / max(run.epoch_steps, *batch, 1)
    return epochs, seconds[finished.clip(0, len(seconds) - 1)] + run.batches["seconds"]


def _smooth(values: Sequence[float]) -> list[float]:
    """The means of up to `TRAINING_POINTS` consecutive parts."""
    parts = np.array_split(np.asarray(values, float), max(1, min(len(values), TRAINING_POINTS)))
    return [part.mean() for part in parts if len(part)]


def _styles(runs: Sequence[RunCurves]) -> Iterable[dict]:
    """For each run a colour and a dash of its kind, in a shade and with a marker of its own."""
    deconv_kinds = {run.kind for run in runs if not run.kind.startswith("bn")}
    # From the last name on, so that deconv-mode5, the default, has one colour in every picture.
    colors = dict(zip(sorted(deconv_kinds, reverse=True), cycle(DECONV_COLORS), strict=False))
    alike, drawn = Counter(run.kind for run in runs), Counter()
    for run in runs:
        number = drawn[run.kind]
        drawn[run.kind] += 1
        darkness = DARKEST * number / max(alike[run.kind] - 1, 1)
        color = _darken(colors.get(run.kind, BATCHNORM_COLOR), darkness)
        style = {"color": color, "marker": MARKERS[number % len(MARKERS)]}
        dash = "-" if run.kind in colors else "--"
        yield {**style, "linestyle": dash, "markeredgecolor": "white", "markeredgewidth": 0.5}


def _darken(color: str, part: float) -> tuple[float, ...]:
    """The colour, `part` of the way to black."""
    return tuple((1 - part) * channel for channel in to_rgb(color))


def _marker_size(epochs: Sequence[float]) -> float:
    """Points; a run of one epoch has nothing but its markers, one of a hundred hardly needs any."""
    return 7 if len(epochs) <= 5 else 4 if len(epochs) <= 30 else 2


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    if axes.get_xscale() == "linear":
        axes.set_xlim(left=0)
    if x == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(labelbottom=True, labelleft=True)  # shared axes would hide the inner ones
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: str | Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
