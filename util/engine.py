"""One pass over the data, to train or to test. Returns figures; logging is the caller's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from .compute import Compute
from .console import progress_bar
from .distributed import World
from .metrics import count_hits
from .optim import Criterion
from .run import RunError
from .signals import Stopped, Wish, no_wish

SHOW_SECONDS = 1.0  # between two readings for the progress bar, each of which waits for a GPU

Figures = dict[str, float]


Share = Callable[[int, int], AbstractContextManager[None]]


def no_share(first: int, total: int) -> AbstractContextManager[None]:
    """For layers that need not know the other processes."""
    return nullcontext()


@dataclass(frozen=True)
class Ways:
    """How networks of these layers want to be run; by default as any network is.

    Args:
        share: (number of this process's first picture in a batch, pictures of all processes) ->
            what the forward of a training step runs in.
        settle: a network in evaluation -> what is tested in its place, and gives the same.
        judge: (network, pictures) -> figures about its layers by names, for TensorBoard.
    """

    share: Share = no_share
    settle: Callable[[nn.Module], nn.Module] = lambda model: model
    judge: Callable[[nn.Module, Tensor], Mapping[str, float]] = lambda model, images: {}


class TrainingDiverged(RuntimeError):
    """The training loss or a gradient is not finite any more.

    Attributes:
        batch: number in the epoch, from 1.
        images: the pictures of this process.
    """

    def __init__(self, message: str, batch: int, images: Tensor) -> None:
        super().__init__(message)
        self.batch, self.images = batch, images


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    criterion: Criterion,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    compute: Compute,
    world: World = World(),  # noqa: B008 - frozen
    meters: Meters | None = None,
    max_steps: int | None = None,
    on_batch: Callable[[int, Figures], None] = lambda batch, figures: None,
    wish: Wish = no_wish,
    share: Share = no_share,
    title: str = "train",
) -> Figures:
    """Train on every batch once, or until the epoch has had `max_steps`.

    Args:
        loader: gives this process its share of each batch. Shares may be empty, but all processes
            have as many.
        world: the processes that step together. Their gradients are averaged by the model
            (DistributedDataParallel), so each loss is weighted to make that the gradient of the
            mean over the whole batch. All figures are those of whole batches.
        meters: of the batches of this epoch that were trained on before, which the loader leaves
            out (`EpochBatches.set_epoch`); those of now are added, each before its `on_batch`.
        on_batch: called as on_batch(batch, figures) after every batch, with its number in the epoch
            from 1, its loss, top1 and top5, the lr of its step, and the seconds of training since
            the epoch began.
        wish: read in every step; any process's stops all of them after it, but for the last of the
            epoch.
        share: makes what the forward of one of several processes runs in.
        title: of the progress bar, which appears on a terminal only.

    Returns:
        loss, top1, top5 (percent) averaged over the pictures as the network learned them, seconds,
        images, steps, and lr, the rate of the last step.

    Raises:
        TrainingDiverged: a loss or a gradient is not finite, in all processes at once. No parameter
            has been updated with it; BatchNorm's running statistics may have taken the batch in.
        Stopped: by `wish`, in all processes at once.
        DataError: the loader fails; what was trained before stands.
        RunError: BatchNorm has met a single picture, of which there is no variance.
    """
    model.train()
    meters = Meters() if meters is None else meters
    first, steps = meters.steps + 1, meters.steps + len(loader)
    steps = steps if max_steps is None else min(max_steps, steps)
    batches = islice(loader, steps - meters.steps)
    with meters.timed(), progress_bar(batches, title, total=steps, initial=meters.steps) as bar:
        for step, batch in enumerate(bar, start=first):
            images, targets = compute.place_batch(*batch)
            within = nullcontext()
            if world.size > 1:
                within = share(*world.locate(len(images), images.device))
            try:
                with within:
                    loss, row = _forward(model, criterion, compute, images, targets)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise RunError(
                    f"{title}, batch {step}: one picture alone is too few for BatchNorm; choose "
                    "another --batch-size"
                ) from error
            row = world.sum(torch.cat([row, row.new_tensor([wish()])]))
            part = len(targets) / row[0].clamp(min=1)  # of the whole batch
            largest = compute.backward(loss * (part * world.size).to(loss.dtype), optimizer)
            *row, asked, largest = torch.cat([row, largest.to(row)[None]]).cpu()  # waits for a GPU
            row = torch.stack(row)
            figures = _average([row])
            for name, value in (("loss", figures["loss"]), ("largest gradient", largest)):
                if figures["images"] and not math.isfinite(value):
                    place = f"{title}, batch {step}"
                    raise TrainingDiverged(f"{place}: the {name} is {value:g}", step, images)
            compute.step(optimizer)
            meters.add(row, optimizer.param_groups[0]["lr"])
            scheduler.step()
            _show(bar, meters)
            now = {name: figures[name] for name in ("loss", "top1", "top5")}
            on_batch(step, {**now, "lr": meters.lr, "seconds": meters.seconds})
            if asked and step < steps:
                raise Stopped(wish())
    return meters.training_figures()


@contextmanager
def first_input(network: nn.Module) -> Iterator[list[Tensor]]:
    """A list that will hold the first batch that the network is given in the block, if any."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        kept.extend(given[: 1 - len(kept)])

    hook = network.register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        hook.remove()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    criterion: Criterion,
    *,
    compute: Compute,
    world: World = World(),  # noqa: B008 - frozen
    max_steps: int | None = None,
    wish: Wish = no_wish,
    title: str = "test",
) -> Figures:
    """loss, top1, top5 (percent) over the pictures of all processes; seconds and images.

    Each process takes some of the batches. The figures are sums of what each batch gives, added
    without rounding, so they do not depend on which process computed which.

    Raises:
        Stopped: by the `wish` of any process, in all of them.
    """
    model.eval()
    steps = len(loader) if max_steps is None else min(max_steps, len(loader))
    meters = Meters()
    with meters.timed(), progress_bar(islice(loader, steps), title, total=steps) as bar:
        for batch in bar:
            meters.add(_forward(model, criterion, compute, *compute.place_batch(*batch))[1])
            _show(bar, meters)
            if wish():
                break
    if any(world.gather(wish())):
        raise Stopped(wish())
    return meters.figures(world)


def _forward(
    model: nn.Module, criterion: Criterion, compute: Compute, images: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean loss, and a row of sums (4,) float64: images, loss, top1 hits, top5 hits."""
    with compute.autocast():
        logits = model(images)
        # The mean over no picture would be NaN, in the gradients of every process too.
        loss = criterion(logits, targets) if len(targets) else logits.sum()
    hits = count_hits(logits.detach(), targets)
    total = loss.detach().double() * len(targets)
    return loss, torch.stack([torch.full_like(total, len(targets)), total, *hits])


def _average(rows: list[Tensor]) -> Figures:
    """loss, top1, top5 (percent) and images of rows of sums; NaN where there is no picture."""
    columns = zip(*torch.stack(rows).tolist(), strict=True) if rows else [[]] * 4
    images, loss, top1, top5 = (_exact_sum(column) for column in columns)
    count = images or math.nan
    percent = {"top1": 100 * top1 / count, "top5": 100 * top5 / count}
    return {"loss": loss / count, **percent, "images": int(images)}


def _exact_sum(values: list[float]) -> float:
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # infinities of both signs
        return math.nan


class Meters:
    """An epoch so far: a row of sums for each batch, and seconds.

    Args:
        state: what `state_dict` gave, to go on from; None: nothing so far.

    Attributes:
        lr: the rate of the last step; NaN before the first.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"rows": torch.zeros(0, 4), "lr": math.nan, "seconds": 0.0}
        self.rows: list[Tensor] = list(state["rows"])
        self.lr: float = state["lr"]
        self._before, self._start = state["seconds"], None
        self.next_show = 0.0  # in seconds since the start

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._table(), "lr": self.lr, "seconds": self.seconds}

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The block's seconds count."""
        self._start = time.perf_counter()
        try:
            yield
        finally:
            self._before, self._start = self.seconds, None

    def add(self, row: Tensor, lr: float = math.nan) -> None:
        self.rows.append(row)
        self.lr = lr

    @property
    def steps(self) -> int:
        return len(self.rows)

    @property
    def seconds(self) -> float:
        running = 0.0 if self._start is None else time.perf_counter() - self._start
        return self._before + running

    def figures(self, world: World = World()) -> Figures:  # noqa: B008 - frozen
        """The averages so far, over the rows of all processes of `world`."""
        rows = [row for part in world.gather(self._table()) for row in part]
        return {**_average(rows), "seconds": self.seconds}

    def training_figures(self) -> Figures:
        """The averages so far, how many steps they are of, and the rate of the last."""
        return {**self.figures(), "steps": self.steps, "lr": self.lr}

    def _table(self) -> Tensor:
        return torch.stack(self.rows).cpu() if self.rows else torch.zeros(0, 4)


def _show(bar: tqdm, meters: Meters) -> None:
    """Put the figures on the bar: at the first batch, then once in SHOW_SECONDS."""
    if not bar.disable and meters.seconds >= meters.next_show:
        now = meters.figures()
        meters.next_show = now["seconds"] + SHOW_SECONDS
        speed = now["images"] / now["seconds"]
        bar.set_postfix_str(
            f"loss {now['loss']:.3f}, top1 {now['top1']:.1f}%, {speed:.0f} pictures/s"
        )
