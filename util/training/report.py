"""What the console and the logs are told while a network trains."""

from __future__ import annotations

from torch import Tensor, nn

from util.console import print_line, shows_bars
from util.tracking.logger import RunLogger
from util.training.metrics import Metrics
from util.training.resume import Progress


def report_batch(
    logger: RunLogger, done: Progress, print_freq: int, msg: bool, batch: int, now: Metrics
) -> None:
    """A row in the log every `print_freq` steps of the run; a line, too, where no bar is seen.

    With `msg` a line for every batch.
    """
    step = done.step + batch
    regular = step % print_freq == 0
    if msg or (regular and not shows_bars()):
        print_line(
            f"epoch {done.epoch + 1} batch {batch}  loss {now['loss']:.4f}"
            f"  top1 {now['top1']:.2f}%  lr {now['lr']:.3g}"
        )
    if regular:
        logger.batch(done.epoch + 1, step, **now)


def report_epoch(
    logger: RunLogger, epoch: int, epochs: int, train: Metrics, test: Metrics, model: nn.Module
) -> None:
    """A line on the console; rows, curves and the first layer's filters in the logs."""
    logger.epoch(epoch, train, test)
    logger.filters(epoch, *first_filters(model))
    print_line(
        f"epoch {epoch:{len(str(epochs))}}/{epochs}"
        f"  train loss {train['loss']:.4f} top1 {train['top1']:5.2f}%"
        f"  test loss {test['loss']:.4f} top1 {test['top1']:5.2f}%"
        f"  lr {train['lr']:.2g}  {train['seconds'] + test['seconds']:.1f} s"
    )


def first_filters(model: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Kernels of the first convolution, and as the raw image meets them if it whitens."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        return None, None
    whitened = first.whitened_weight() if hasattr(first, "whitened_weight") else None
    return first.weight.detach(), whitened
