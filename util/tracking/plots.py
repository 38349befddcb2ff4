"""Plots: curves of one run, curves of several runs, losses of a recipe, filters of a layer.

Figures are made without pyplot: no global state, no display. Import this module where a plot is
drawn, because matplotlib and torchvision take a second to import.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor
from torchvision.utils import make_grid

from util.files import atomic_write

METRICS = {"top1": "top-1 accuracy (%)", "loss": "loss (mean per image)"}
AXES = {"step": "training step", "seconds": "training time (s)"}
# Okabe and Ito's colours, which the colour-blind can tell apart, and a grey. BatchNorm is blue.
BATCHNORM_COLOR = "#0072B2"
DECONV_COLORS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = "os^Dvp"
DARKEST = 0.65  # blackness of the darkest shade of a kind
LEGEND_BELOW = "outside lower center"
MAX_FILTERS, FILTER_PIXELS = 256, 32

Columns = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Series:
    """Values of one metric of one run, at optimizer steps and at seconds of training."""

    step: np.ndarray
    seconds: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class RunCurves:
    """Curves of one run.

    Args:
        train, test: columns `loss top1 seconds` with one row per epoch.
        batches: columns of `train_batch.log`.
        ends: optimizer steps at the end of each epoch; a cut epoch ends where training ended.
        epoch_steps: optimizer steps of a whole epoch; 0: unknown.
        val: as `test`, of the validation images; None: there are none.
    """

    train: Columns
    test: Columns
    batches: Columns
    ends: Sequence[int]
    epoch_steps: int
    val: Columns | None = None

    def training(self, metric: str) -> Series:
        """Return the rows of `train_batch.log`, means over --print-freq steps.

        A run with fewer rows than epochs, all of them short, gives the means of its epochs.
        """
        if len(self.batches["batch"]) < len(self.ends):
            return self._by_epoch(self.train[metric])
        batch, epoch = (np.asarray(self.batches[key], int) for key in ("batch", "epoch"))
        starts = self._seconds[(epoch - 1).clip(0, len(self.ends))]
        step = (epoch - 1) * max(self.epoch_steps, *batch) + batch
        values = np.asarray(self.batches[metric], float)
        return Series(step, starts + self.batches["seconds"], values)

    def testing(self, metric: str) -> Series:
        """Return the test metric after each epoch."""
        return self._by_epoch(self.test[metric])

    def validation(self, metric: str) -> Series:
        """Return the validation metric after each epoch."""
        return self._by_epoch(self.val[metric])

    def _by_epoch(self, values: Sequence[float]) -> Series:
        return Series(np.asarray(self.ends), self._seconds[1:], np.asarray(values, float))

    @property
    def _seconds(self) -> np.ndarray:
        """Seconds of training at the start of each epoch and at the end of the last."""
        return np.cumsum([0.0, *self.train["seconds"]])


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in the seed alone.

    Args:
        label: text for the legend.
        kind: groups of one kind are shades of one colour; kinds "bn..." are blue and dashed.
        runs: one or more.
    """

    label: str
    kind: str
    runs: Sequence[RunCurves]


def plot_training(run: RunCurves, path: str | Path, *, title: str = "") -> None:
    """Plot accuracy and loss of one run against steps, as a PNG."""
    groups, panels = [RunGroup("", "run", [run])], list(product(METRICS, ["step"]))
    figure = _draw_panels(Figure(figsize=(10, 4.5), layout="constrained"), 1, panels, groups)
    _add_legend(figure, _describe_marks(groups))
    _save(figure, path, title)


def plot_comparison(
    groups: Sequence[RunGroup], path: str | Path, *, title: str = "", accuracy_only: bool = False
) -> None:
    """Plot accuracy and loss of several groups against steps and seconds, as a PNG.

    A line with markers is the test set after each epoch; a thin line is the mean
    over --print-freq training steps. Both are means over the seeds, in a band from the lowest to
    the highest.

    Args:
        groups: curves to draw, in the order of the legend.
        path: file to write.
        title: title of the figure.
        accuracy_only: plot accuracy against steps alone. The legend tells the final accuracy; the
            highest comes first.
    """
    if accuracy_only:
        size, rows, panels = (10, max(4.2, 0.7 * len(groups))), 1, [("top1", "step")]
        groups = sorted(groups, key=_final_accuracy, reverse=True)
    else:
        size, rows, panels = (11, 8 + 0.12 * len(groups)), 2, list(product(METRICS, AXES))
    figure = _draw_panels(Figure(figsize=size, layout="constrained"), rows, panels, groups)
    lines = [Line2D([], [], linewidth=2, **style) for style in _styles(groups)]
    labels = [" ".join(group.label.split()) for group in groups]
    if accuracy_only:
        pairs = zip(labels, map(_final_accuracy, groups), strict=True)
        labels = [label.replace(", ", "\n", 1) + f"\ntest {final:.1f} %" for label, final in pairs]
    entries = [*zip(lines, labels, strict=True), *_describe_marks(groups)]
    _add_legend(figure, entries, "outside right center" if accuracy_only else LEGEND_BELOW)
    _save(figure, path, title)


def plot_losses(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], path: str | Path
) -> None:
    """Plot training loss against optimizer steps, one panel per title, as a PNG.

    A panel whose losses span more than a decade has a log scale.

    Args:
        panels: maps a title to a panel; a panel maps a label to pairs (step, loss).
        path: file to write.
    """
    rows = 1 if len(panels) <= 3 else 2
    columns = math.ceil(len(panels) / rows)
    figure = Figure(figsize=(4.5 * columns, 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        shown = [loss for points in lines.values() for _, loss in points]
        # Ticks of a log scale are sparse and hard to read within a decade.
        axes.set_yscale("log" if shown and max(shown) > 10 * min(shown) else "linear")
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
    """Return an image of convolution kernels in a grid, each scaled to black ... white.

    Args:
        weight: kernels (O, C, h, w), of which the first 256 are drawn. Three channels are drawn as
            red, green and blue; any other number is averaged and drawn grey.

    Returns:
        Image (3, H, W) in [0, 1], on the CPU. NaN and infinity count as zero. A constant kernel is
        black.
    """
    kernels = weight.detach()[:MAX_FILTERS].float().cpu().nan_to_num(0.0, 0.0, 0.0)
    if kernels.shape[1] != 3:
        kernels = kernels.mean(dim=1, keepdim=True)  # O 1 h w
    scale = max(1, FILTER_PIXELS // max(kernels.shape[2:]))
    images = F.interpolate(kernels, scale_factor=scale, mode="nearest")
    columns = math.ceil(math.sqrt(len(images)))
    return make_grid(images, nrow=columns, normalize=True, scale_each=True, pad_value=1.0)


def _draw_panels(
    figure: Figure, rows: int, panels: Sequence[tuple[str, str]], groups: Sequence[RunGroup]
) -> Figure:
    """Draw all groups into panels, each of one metric against steps or seconds."""
    grid = figure.subplots(rows, len(panels) // rows, squeeze=False)
    epoch_steps = {run.epoch_steps for group in groups for run in group.runs}
    for (metric, x), axes in zip(panels, grid.flat, strict=True):
        for group, style in zip(groups, _styles(groups), strict=True):
            _draw_group(axes, group, metric, x, style)
        _dress(axes, AXES[x], METRICS[metric])
        if x == "step" and len(epoch_steps) == 1 and (steps := max(epoch_steps)):
            functions = (lambda step: step / steps, lambda epoch: epoch * steps)
            axes.secondary_xaxis("top", functions=functions).set_xlabel("epoch")
    return figure


def _draw_group(axes: Axes, group: RunGroup, metric: str, x: str, style: dict[str, Any]) -> None:
    """Draw the training and the test curve of a group, each in a band over the seeds."""
    color = style["color"]
    validates = all(run.val for run in group.runs)
    for part in ("training", *(["validation"] if validates else []), "testing"):
        at, values = _align([getattr(run, part)(metric) for run in group.runs], x)
        mean, low, high = values.mean(0), values.min(0), values.max(0)
        if part == "training":
            axes.plot(at, mean, color=color, linestyle=style["linestyle"], linewidth=1.2, alpha=0.8)
        elif part == "validation":
            axes.plot(at, mean, color=color, linestyle=":", linewidth=1.5)
        else:
            size = 8 if len(at) <= 5 else 4 if len(at) <= 30 else 2
            axes.plot(at, mean, linewidth=2, markersize=size, zorder=3, **style)
        if len(group.runs) > 1:
            axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
            if part == "testing" and len(at) <= 5:  # a band over one epoch has no width
                axes.vlines(at, low, high, color=color, linewidth=1.5)


def _final_accuracy(group: RunGroup) -> float:
    """Return the mean test top-1 over the seeds at the end, in percent."""
    return float(np.mean([run.test["top1"][-1] for run in group.runs]))


def _align(series: Sequence[Series], x: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions (P) and values (runs, P) at the steps that all runs have in common."""
    common = reduce(np.intersect1d, [one.step for one in series])
    shared = [np.isin(one.step, common) for one in series]
    at, values = (
        np.stack([getattr(one, name)[mask] for one, mask in zip(series, shared, strict=True)])
        for name in (x, "values")
    )
    return at.mean(axis=0), values


def _describe_marks(groups: Sequence[RunGroup]) -> list[tuple[Any, str]]:
    """Return legend entries for the lines, with the steps that a training point averages over."""
    runs = [run for group in groups for run in group.runs]
    steps = {int(step) for run in runs for step in np.diff(run.training("loss").step)}
    mean = f", mean over {steps.pop()} steps" if len(steps) == 1 else ""
    grey = {"color": "#555555"}
    marks = [
        (Line2D([], [], marker="o", markersize=7, linewidth=2, **grey), "test set"),
        (Line2D([], [], linewidth=1.2, **grey), f"training{mean}"),
    ]
    if any(run.val for run in runs):
        marks.append((Line2D([], [], linestyle=":", linewidth=1.5, **grey), "validation images"))
    if any(len(group.runs) > 1 for group in groups):
        marks.append((Patch(alpha=0.3, **grey), "lowest to highest seed"))
    return marks


def _add_legend(
    figure: Figure, entries: Sequence[tuple[Any, str]], place: str = LEGEND_BELOW
) -> None:
    """Put a legend outside the plots; below them in as many columns as fit."""
    handles, labels = zip(*entries, strict=True)
    columns = max(1, min(len(labels), 120 // (max(map(len, labels)) + 8)))
    form = {"ncols": columns if place == LEGEND_BELOW else 1, "handlelength": 3, "frameon": False}
    for text in figure.legend(handles, labels, loc=place, **form).get_texts():
        text.set_parse_math(False)  # the name of a folder may contain dollars


def _styles(groups: Sequence[RunGroup]) -> Iterator[dict[str, Any]]:
    """Yield colour, dash and marker of each group: a colour and a dash for each kind."""
    kinds = [group.kind for group in groups]
    # From the last name on, so that deconv-mode5, the default, has one colour in every figure.
    others = sorted({kind for kind in kinds if not kind.startswith("bn")}, reverse=True)
    colors = dict(zip(others, cycle(DECONV_COLORS), strict=False))
    for index, kind in enumerate(kinds):
        number = kinds[:index].count(kind)  # the later, the darker
        light = 1 - DARKEST * number / max(kinds.count(kind) - 1, 1)
        color = tuple(light * channel for channel in to_rgb(colors.get(kind, BATCHNORM_COLOR)))
        style = {"color": color, "marker": MARKERS[number % len(MARKERS)]}
        dash = "-" if kind in colors else "--"
        yield {**style, "linestyle": dash, "markeredgecolor": "white", "markeredgewidth": 0.5}


def _dress(axes: Axes, x: str, y: str) -> None:
    """Set labels, limits and grid."""
    axes.set(xlabel=x, ylabel=y)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: str | Path, title: str = "") -> None:
    figure.suptitle(title, parse_math=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
