"""Checkpoints as a run writes them, made without a run."""

from types import SimpleNamespace

import torch

from util.checkpoint.schema import HISTORY
from util.data.images import DataSpec
from util.distributed.world import World
from util.training.accelerator import Accelerator
from util.training.metrics import EpochMetrics
from util.training.optim import build_optimizer
from util.training.resume import Progress, TrainingState

CONFIG = {"arch": "vgg11", "deconv": True, "milestone": (1, 2), "epochs": 1000}
SPEC = DataSpec("digits", 1, 32, ("0", "1"), (0.5,), (0.5,))


def make_training(model, *, spec=SPEC, images=20, skipped=(), **changes):
    """Return the TrainingState of `model` under SGD, with `images` images in each loader."""
    loaders = [SimpleNamespace(dataset=range(images), skipped=set(skipped)) for _ in range(2)]
    optimizer = build_optimizer("SGD", model.parameters(), lr=0.1)
    accelerator = Accelerator(torch.device("cpu"))
    return TrainingState(
        dict(CONFIG), spec, loaders, model, optimizer, accelerator, World(), **changes
    )


def take_step(training):
    """Train one step on ones, so that the optimizer has state."""
    weight = next(training.model.parameters())
    training.model(torch.ones(1, weight.shape[1])).sum().backward()
    training.optimizer.step()


def make_metrics(batches):
    """Return the metrics of an epoch under way after `batches` batches."""
    metrics = EpochMetrics()
    for _ in range(batches):
        metrics.add(torch.tensor([4.0, 2.0, 1.0, 3.0], dtype=torch.float64), lr=0.1)
    return metrics


def make_state(*, epoch=2, step=None, batches=0, best_epoch=0, **changes):
    """Return the checkpoint after `epoch` epochs of `step` steps in all, `batches` of the next."""
    step = 5 * epoch if step is None else step
    best = {"best_epoch": best_epoch, "best_top1": 10.0 * best_epoch} if best_epoch else {}
    best |= {"best_step": step} if best_epoch == epoch else {}
    past = {"epoch": list(range(1, epoch + 1)), "step": [step] * epoch}
    training = make_training(
        torch.nn.Linear(3, 2),
        progress=Progress(epoch, step, 4 * step, **best),
        metrics=make_metrics(batches),
    )
    take_step(training)
    history = dict.fromkeys(HISTORY, [float("nan")] * epoch) | past
    return {**training.capture(), "history": history, **changes}
