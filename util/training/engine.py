"""One pass over the data, to train or to test a model. Returns metrics; the caller logs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from itertools import islice

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from util.console import progress_bar
from util.distributed.world import World
from util.errors import RunError, Stopped
from util.training.accelerator import Accelerator, list_trained
from util.training.hooks import BatchContext, enter_batch
from util.training.metrics import EpochMetrics, Metrics, count_hits
from util.training.micro_batches import average_gradients, split_batch
from util.training.optim import Criterion
from util.training.signals import StopRequest, never_stop
from util.training.step_reader import HostCopy, PendingStep, StepReader

REFRESH_SECONDS = 1.0  # between updates of the progress bar; a test waits for a GPU each time


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    criterion: Criterion,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    accelerator: Accelerator,
    world: World = World(),  # noqa: B008 - frozen
    epoch_metrics: EpochMetrics | None = None,
    micro_batch: int | None = None,
    max_steps: int | None = None,
    on_batch: Callable[[int, Metrics], None] = lambda batch, metrics: None,
    on_update: Callable[[], None] = lambda: None,
    reads_now: Callable[[int], bool] = lambda batch: False,
    stop_request: StopRequest = never_stop,
    batch_context: BatchContext | None = None,
    title: str = "train",
) -> Metrics:
    """Train on every batch once, or until the epoch has `max_steps` steps.

    Args:
        model: in several processes, a model that averages gradients (DistributedDataParallel).
        loader: yields this rank's part of each batch. Parts may be empty, but all ranks have the
            same number.
        criterion: loss of (logits, targets), averaged over the batch.
        optimizer: optimizer of the model's parameters.
        scheduler: learning rate, one step per optimizer step.
        accelerator: device and precision.
        world: ranks that step together. Metrics are of whole batches.
        epoch_metrics: metrics of the earlier batches of this epoch, which the loader omits;
            receives each new batch before `on_batch`. None: an empty epoch.
        micro_batch: most images of a forward, over all ranks; a larger batch is split, and its
            gradients are averaged. None: no limit.
        max_steps: most steps of the epoch, earlier batches included; None: no limit.
        on_batch: called for each step with the number of the batch in the epoch, from 1, and its
            metrics: loss, top1, top5, images, lr, and seconds since the epoch began. If the
            accelerator reads late, the call comes during the next step.
        on_update: called after each update of the parameters.
        reads_now: number of a batch -> True if `on_batch` must be called before the next step.
        stop_request: a request on any rank stops all ranks after the step, except the last step;
            one step later if the accelerator reads late.
        batch_context: makes the context of each forward.
        title: title of the progress bar.

    Returns:
        loss, top1, top5 (percent), images, seconds, steps, and lr of the last step.

    Raises:
        TrainingDiverged: a loss or gradient is not finite, on all ranks at once. Neither this step
            nor a later one has updated any parameter. Running statistics may include the batch and
            the next one.
        Stopped: by `stop_request`, on all ranks at once.
        DataError: the loader fails; the earlier steps stand.
        RunError: BatchNorm met a single image, which has no variance.
    """
    model.train()
    epoch_metrics = EpochMetrics() if epoch_metrics is None else epoch_metrics
    first, steps = epoch_metrics.steps + 1, epoch_metrics.steps + len(loader)
    steps = steps if max_steps is None else min(max_steps, steps)
    reader = StepReader(epoch_metrics, on_batch, title)
    watch = closing(_watch(loader, epoch_metrics, steps, title))
    with epoch_metrics.timed(), reader, watch as batches:
        for step, batch in enumerate(batches, start=first):
            images, targets = accelerator.batch_to_device(*batch)
            offset, total = world.batch_offset(len(images))
            parts, rows, stops = split_batch(offset, total, micro_batch), [], False
            optimizer.zero_grad()
            try:
                for part in parts:
                    own = images[part.own], targets[part.own]
                    with average_gradients(model, last=part is parts[-1]):
                        with enter_batch(batch_context, part.offset, part.total):
                            loss, row = _forward(model, criterion, accelerator, *own)
                        if part is parts[0]:  # a GPU has this forward to do meanwhile
                            stops = reader.read()
                        # The average over ranks of the summed losses is the mean over the batch.
                        weight = len(own[0]) / max(total, 1) * world.size
                        accelerator.backward(loss * weight)
                    rows.append(row)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise RunError(
                    f"{title}, batch {step}: a single image is too few for BatchNorm; choose "
                    "another --batch-size"
                ) from error
            sums = world.sum(torch.cat([*rows, row.new_full((1,), stop_request())]))
            results = torch.cat([sums, accelerator.largest_gradients(optimizer).to(sums)])
            lr, shares = optimizer.param_groups[0]["lr"], [images[part.own] for part in parts]
            trained = list_trained(optimizer)
            reader.add(PendingStep(step, lr, shares, trained, HostCopy(results)))
            accelerator.step(optimizer, ~results.isfinite().all())
            scheduler.step()
            on_update()
            if stops or not accelerator.reads_late or reads_now(step):
                stops = reader.read() or stops
            if stops and step < steps:
                raise Stopped(stop_request())
    return epoch_metrics.training_metrics()


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
    """Return loss, top1, top5 (percent), images and seconds over the batches of all ranks.

    The metrics do not depend on which rank tests which batch.

    Args:
        model, criterion, accelerator, world, title: as in `train_one_epoch`.
        loader: yields this rank's batches.
        max_steps: most batches of this rank; None: no limit.
        stop_request: a request on any rank stops all ranks, at the latest after their batches.

    Raises:
        Stopped: by `stop_request`, on all ranks at once.
    """
    model.eval()
    steps = len(loader) if max_steps is None else min(max_steps, len(loader))
    epoch_metrics = EpochMetrics()
    watch = closing(_watch(loader, epoch_metrics, steps, title))
    with epoch_metrics.timed(), watch as batches:
        for batch in batches:
            images, targets = accelerator.batch_to_device(*batch)
            epoch_metrics.add(_forward(model, criterion, accelerator, images, targets)[1])
            if stop_request():
                break
        epoch_metrics.fetch()  # the time includes what a GPU still has to do
    if any(world.gather(stop_request())):
        raise Stopped(stop_request())
    return epoch_metrics.average(world)


@contextmanager
def first_input(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that receives the first batch that `model` gets within the block."""
    inputs: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, args: inputs.extend(args[: 1 - len(inputs)]))
    try:
        yield inputs
    finally:
        hook.remove()


def _forward(
    model: nn.Module,
    criterion: Criterion,
    accelerator: Accelerator,
    images: Tensor,
    targets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the mean loss, and the sums (4,) float64 of images, loss, top1 hits, top5 hits."""
    with accelerator.autocast():
        logits = model(images)
        # The mean over no image is NaN and would spread to the gradients of every rank.
        loss = criterion(logits, targets) if len(targets) else logits.sum()
    hits = count_hits(logits.detach(), targets)
    total = loss.detach().double() * len(targets)
    return loss, torch.stack([torch.full_like(total, len(targets)), total, *hits])


def _watch(
    loader: DataLoader, epoch_metrics: EpochMetrics, steps: int, title: str
) -> Generator[list[Tensor], None, None]:
    """Yield batches up to `steps` of the epoch, below a progress bar with the metrics so far."""
    done, next_refresh = epoch_metrics.steps, 0.0
    bar = progress_bar(islice(loader, steps - done), title, total=steps, initial=done)
    with bar:
        for batch in bar:
            yield batch
            if bar.disable or not epoch_metrics.steps:
                continue
            if epoch_metrics.seconds >= next_refresh:
                metrics = epoch_metrics.average()
                next_refresh = metrics["seconds"] + REFRESH_SECONDS
                throughput = metrics["images"] / metrics["seconds"]
                bar.set_postfix_str(
                    f"loss {metrics['loss']:.3f}, top1 {metrics['top1']:.1f}%, "
                    f"{throughput:.0f} images/s"
                )
