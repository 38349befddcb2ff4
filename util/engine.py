"""One pass over the data, to train or to test. Returns figures; logging is the caller's."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from .metrics import Average, accuracy
from .optim import Criterion

SHOW_SECONDS = 1.0  # between two readings for the progress bar, each of which waits for a GPU

Figures = dict[str, float]


class TrainingDiverged(RuntimeError):
    """The training loss is not finite any more."""


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    criterion: Criterion,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    device: torch.device,
    max_steps: int | None = None,
    on_batch: Callable[[int, Figures], None] = lambda batch, figures: None,
    report_every: int = 10,
    title: str = "train",
) -> Figures:
    """Train on every batch once, or on the first `max_steps`.

    Args:
        on_batch: called as on_batch(batch, figures) after every `report_every`-th batch, with its
            number from 1, its loss, top1 and top5, the lr of its step, and the seconds since the
            epoch began.
        title: of the progress bar, which appears on a terminal only.

    Returns:
        loss, top1, top5 (percent) averaged over the pictures as the network learned them, seconds,
        images, steps, and lr, the rate of the last step.

    Raises:
        TrainingDiverged: a loss is not finite. No parameter has been updated with it; running
            statistics may have taken the batch in.
    """
    model.train()
    steps = len(loader) if max_steps is None else min(max_steps, len(loader))
    meters = _Meters()
    with _bar(islice(loader, steps), steps, title) as bar:
        for step, (images, targets) in enumerate(_move(bar, device), start=1):
            logits = model(images)
            loss = criterion(logits, targets)
            if not torch.isfinite(loss):
                raise TrainingDiverged(f"{title}, batch {step}: the loss is {loss.item()}")
            optimizer.zero_grad()
            loss.backward()
            lr = optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()
            batch = meters.update(loss.detach(), logits.detach(), targets)
            _show(bar, meters)
            if step % report_every == 0:
                figures = {name: float(value) for name, value in batch.items()}
                on_batch(step, {**figures, "lr": lr, "seconds": meters.seconds})
    return {**meters.figures(), "steps": steps, "lr": lr}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    criterion: Criterion,
    *,
    device: torch.device,
    title: str = "test",
) -> Figures:
    """loss, top1, top5 (percent) over all pictures of `loader`; seconds and images."""
    model.eval()
    meters = _Meters()
    with _bar(loader, len(loader), title) as bar:
        for images, targets in _move(bar, device):
            logits = model(images)
            meters.update(criterion(logits, targets), logits, targets)
            _show(bar, meters)
    return meters.figures()


class _Meters:
    """Averages over pictures, and a clock that starts with them."""

    def __init__(self) -> None:
        self.averages = {name: Average() for name in ("loss", "top1", "top5")}
        self.images = 0
        self.start = time.perf_counter()
        self.next_show = 0.0  # in seconds since the start

    def update(self, loss: Tensor, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Count a batch, and return its own figures."""
        top1, top5 = accuracy(logits, targets)
        batch = {"loss": loss, "top1": top1, "top5": top5}
        for name, value in batch.items():
            self.averages[name].update(value, len(targets))
        self.images += len(targets)
        return batch

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def figures(self) -> Figures:
        averages = {name: average.value for name, average in self.averages.items()}
        return {**averages, "seconds": self.seconds, "images": self.images}


def _bar(batches: Iterable, steps: int, title: str) -> tqdm:
    """A progress bar with the time left; nothing where stderr is no terminal."""
    columns, lines = shutil.get_terminal_size(
        (100, 24)
    )  # tqdm draws nothing if the size is unknown
    return tqdm(
        batches, title, steps, leave=False, ncols=columns, nrows=lines, unit="batch", disable=None
    )


def _show(bar: tqdm, meters: _Meters) -> None:
    """Put the figures on the bar: at the first batch, then once in SHOW_SECONDS."""
    if not bar.disable and meters.seconds >= meters.next_show:
        now = meters.figures()
        meters.next_show = now["seconds"] + SHOW_SECONDS
        speed = now["images"] / now["seconds"]
        bar.set_postfix_str(
            f"loss {now['loss']:.3f}, top1 {now['top1']:.1f}%, {speed:.0f} pictures/s"
        )


def _move(batches: Iterable, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for images, targets in batches:
        yield images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
