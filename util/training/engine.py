"""One pass over the data, to train or to test. Returns figures; logging is the caller's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from util.console import progress_bar
from util.distributed.world import World
from util.errors import RunError, Stopped, TrainingDiverged
from util.training.accelerator import Accelerator
from util.training.hooks import BatchContext, no_batch_context
from util.training.metrics import EpochMetrics, Metrics, _average, count_hits
from util.training.optim import Criterion
from util.training.signals import StopRequest, never_stop

SHOW_SECONDS = 1.0  # between two readings for the progress bar, each of which waits for a GPU


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    criterion: Criterion,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    accelerator: Accelerator,
    world: World = World(),  # noqa: B008 - frozen
    meters: EpochMetrics | None = None,
    max_steps: int | None = None,
    on_batch: Callable[[int, Metrics], None] = lambda batch, figures: None,
    stop_request: StopRequest = never_stop,
    batch_context: BatchContext = no_batch_context,
    title: str = "train",
) -> Metrics:
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
        stop_request: read in every step; any process's stops all of them after it, but for the
            last of the epoch.
        batch_context: makes what the forward of one of several processes runs in.
        title: of the progress bar, which appears on a terminal only.

    Returns:
        loss, top1, top5 (percent) averaged over the images as the network learned them, seconds,
        images, steps, and lr, the rate of the last step.

    Raises:
        TrainingDiverged: a loss or a gradient is not finite, in all processes at once. No parameter
            has been updated with it; BatchNorm's running statistics may have taken the batch in.
        Stopped: by `wish`, in all processes at once.
        DataError: the loader fails; what was trained before stands.
        RunError: BatchNorm has met a single image, of which there is no variance.
    """
    model.train()
    meters = EpochMetrics() if meters is None else meters
    first, steps = meters.steps + 1, meters.steps + len(loader)
    steps = steps if max_steps is None else min(max_steps, steps)
    batches = islice(loader, steps - meters.steps)
    with meters.timed(), progress_bar(batches, title, total=steps, initial=meters.steps) as bar:
        for step, batch in enumerate(bar, start=first):
            images, targets = accelerator.batch_to_device(*batch)
            within = nullcontext()
            if world.size > 1:
                within = batch_context(*world.batch_offset(len(images), images.device))
            try:
                with within:
                    loss, row = _forward(model, criterion, accelerator, images, targets)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise RunError(
                    f"{title}, batch {step}: one image alone is too few for BatchNorm; choose "
                    "another --batch-size"
                ) from error
            row = world.sum(torch.cat([row, row.new_tensor([stop_request()])]))
            part = len(targets) / row[0].clamp(min=1)  # of the whole batch
            largest = accelerator.backward(loss * (part * world.size).to(loss.dtype), optimizer)
            *row, asked, largest = torch.cat([row, largest.to(row)[None]]).cpu()  # waits for a GPU
            row = torch.stack(row)
            figures = _average([row])
            for name, value in (("loss", figures["loss"]), ("largest gradient", largest)):
                if figures["images"] and not math.isfinite(value):
                    place = f"{title}, batch {step}"
                    raise TrainingDiverged(f"{place}: the {name} is {value:g}", step, images)
            accelerator.step(optimizer)
            meters.add(row, optimizer.param_groups[0]["lr"])
            scheduler.step()
            _show(bar, meters)
            now = {name: figures[name] for name in ("loss", "top1", "top5")}
            on_batch(step, {**now, "lr": meters.lr, "seconds": meters.seconds})
            if asked and step < steps:
                raise Stopped(stop_request())
    return meters.training_metrics()


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
    accelerator: Accelerator,
    world: World = World(),  # noqa: B008 - frozen
    max_steps: int | None = None,
    stop_request: StopRequest = never_stop,
    title: str = "test",
) -> Metrics:
    """loss, top1, top5 (percent) over the images of all processes; seconds and images.

    Each process takes some of the batches. The figures are sums of what each batch gives, added
    without rounding, so they do not depend on which process computed which.

    Raises:
        Stopped: by the `wish` of any process, in all of them.
    """
    model.eval()
    steps = len(loader) if max_steps is None else min(max_steps, len(loader))
    meters = EpochMetrics()
    with meters.timed(), progress_bar(islice(loader, steps), title, total=steps) as bar:
        for batch in bar:
            meters.add(
                _forward(model, criterion, accelerator, *accelerator.batch_to_device(*batch))[1]
            )
            _show(bar, meters)
            if stop_request():
                break
    if any(world.gather(stop_request())):
        raise Stopped(stop_request())
    return meters.figures(world)


def _forward(
    model: nn.Module,
    criterion: Criterion,
    accelerator: Accelerator,
    images: Tensor,
    targets: Tensor,
) -> tuple[Tensor, Tensor]:
    """The mean loss, and a row of sums (4,) float64: images, loss, top1 hits, top5 hits."""
    with accelerator.autocast():
        logits = model(images)
        # The mean over no image would be NaN, in the gradients of every process too.
        loss = criterion(logits, targets) if len(targets) else logits.sum()
    hits = count_hits(logits.detach(), targets)
    total = loss.detach().double() * len(targets)
    return loss, torch.stack([torch.full_like(total, len(targets)), total, *hits])


def _show(bar: tqdm, meters: EpochMetrics) -> None:
    """Put the figures on the bar: at the first batch, then once in SHOW_SECONDS."""
    if not bar.disable and meters.seconds >= meters.next_show:
        now = meters.figures()
        meters.next_show = now["seconds"] + SHOW_SECONDS
        speed = now["images"] / now["seconds"]
        bar.set_postfix_str(
            f"loss {now['loss']:.3f}, top1 {now['top1']:.1f}%, {speed:.0f} images/s"
        )
