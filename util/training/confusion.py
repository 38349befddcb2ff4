"""Report the accuracy of each class, and the confusion matrix as a table and a figure."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor

from util.console import print_line
from util.files import atomic_write
from util.training.metrics import rank_classes
from util.training.optim import Criterion

NAME = "confusion_matrix"  # of the files, without the ending
MAX_LABELS = 50  # classes that the figure names


class ConfusionMatrix:
    """Numbers of test images by class (rows) and predicted class (columns).

    Attributes:
        counts: (classes, classes) int64, on the CPU, of the batches of this rank.
    """

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def watch(self, criterion: Criterion) -> Criterion:
        """Return `criterion`, extended to count the images of each call."""

        def count_images(logits: Tensor, targets: Tensor) -> Tensor:
            predicted = rank_classes(logits)[:, 0]
            cells = targets.cpu(), predicted.cpu()
            self.counts.index_put_(cells, torch.tensor(1), accumulate=True)
            return criterion(logits, targets)

        return count_images


def report_classes(counts: Tensor, classes: Sequence[str], folder: Path) -> None:
    """Print the accuracy of each class that has images; write the matrix into `folder`.

    Args:
        counts: (classes, classes) int64; see ConfusionMatrix.
        classes: names, by target.
        folder: receives confusion_matrix.csv and confusion_matrix.png.
    """
    width = max(map(len, ["class", *classes]))
    print_line(f"{'class':{width}}  {'top1':>7}  images")
    for name, hits, images in zip(classes, counts.diag(), counts.sum(1), strict=True):
        if images:
            print_line(f"{name:{width}}  {100 * hits / images:6.2f}%  {images:6}")
    with atomic_write(folder / f"{NAME}.csv") as file:
        file.write(_format_csv(counts, classes).encode(errors="surrogateescape"))
    _draw(counts, classes, folder / f"{NAME}.png")
    print_line(f"confusion matrix: {folder / NAME}.csv and .png")


def _format_csv(counts: Tensor, classes: Sequence[str]) -> str:
    """Return a table with a row for each class and a column for each predicted class."""
    table = StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["class", *classes])
    writer.writerows([name, *row] for name, row in zip(classes, counts.tolist(), strict=True))
    return table.getvalue()


def _draw(counts: Tensor, classes: Sequence[str], path: Path) -> None:
    """Draw the matrix as a PNG, each row in percent of the images of its class."""
    from matplotlib.figure import Figure  # takes a second to import

    side = 4 + 0.2 * min(len(classes), MAX_LABELS)  # inches
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted class", ylabel="class")
    shares = (100 * counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=100)
    figure.colorbar(image, label="images of the class (%)")
    if len(classes) <= MAX_LABELS:
        ticks = range(len(classes))
        axes.set_xticks(ticks, classes, rotation=90, parse_math=False)
        axes.set_yticks(ticks, classes, parse_math=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
