"""How far a run has come: counted, put into a checkpoint, taken up again."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .checkpoint import CheckpointError, check_compatible
from .compute import Compute
from .engine import Figures, Meters


@dataclass
class Progress:
    """Counts and sums over the finished epochs. Accuracy in percent, time in seconds.

    `best_epoch` is 0 as long as no epoch has had a finite test loss.
    """

    epoch: int = 0
    step: int = 0
    images: int = 0
    best_top1: float = -math.inf
    best_epoch: int = 0
    train_seconds: float = 0.0
    test_seconds: float = 0.0
    latest: Figures = field(default_factory=dict)

    def finish_epoch(self, train: Figures, test: Figures) -> None:
        """Count an epoch, given the figures of `train_one_epoch` and `evaluate`."""
        self.epoch += 1
        self.step += int(train["steps"])
        self.images += int(train["images"])
        self.train_seconds += train["seconds"]
        self.test_seconds += test["seconds"]
        self.latest = {f"train_{key}": train[key] for key in ("loss", "top1", "top5", "lr")}
        self.latest |= {f"test_{key}": test[key] for key in ("loss", "top1", "top5")}
        if math.isfinite(test["loss"]) and test["top1"] > self.best_top1:
            self.best_top1, self.best_epoch = test["top1"], self.epoch

    @property
    def is_best(self) -> bool:
        """No epoch before was as good as the latest."""
        return self.epoch == self.best_epoch

    def summary(self) -> dict[str, float]:
        """The figures for summary.json."""
        return {
            "best_test_top1": self.best_top1,
            "best_epoch": self.best_epoch,
            **self.latest,
            "epochs": self.epoch,
            "steps": self.step,
            "train_seconds": self.train_seconds,
            "test_seconds": self.test_seconds,
            "images_per_second": self.images / self.train_seconds,
        }


def snapshot(
    done: Progress, meters: Meters, model: nn.Module, optimizer: Optimizer, compute: Compute
) -> dict[str, Any]:
    """The part of a checkpoint that `restore` takes up again.

    Args:
        done: the finished epochs; `meters`: the one under way.
    """
    return {
        "epoch": done.epoch,
        "step": done.step + meters.steps,
        "best_top1": done.best_top1,
        "progress": asdict(done),
        "meters": meters.state_dict(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": None,  # has no state: the rate is a closed form of `step`
        "scaler": compute.state_dict(),
    }


def restore(
    saved: dict[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    compute: Compute,
    *,
    spec: dict[str, Any],
    epoch_steps: int,
    total_steps: int,
) -> tuple[Progress, Meters]:
    """Put a checkpoint's weights and optimizer state in place; returns how far it had come.

    Raises:
        CheckpointError: it was trained on other data than `spec` describes, is of another network,
            or its last epoch was cut short by --max-steps, and some of `total_steps` are to go.
    """
    done, meters = Progress(**saved["progress"]), Meters(saved["meters"])
    if done.step < total_steps and done.step != done.epoch * epoch_steps:
        raise CheckpointError(
            f"cannot resume: epoch {done.epoch} of the checkpoint was ended by --max-steps, at "
            f"step {done.step} in the middle of {epoch_steps}; continue one of before"
        )
    restore_model(saved, model, spec=spec)
    with _fitting():
        optimizer.load_state_dict(saved["optimizer"])
        compute.load_state_dict(saved["scaler"])
    return done, meters


def restore_model(saved: dict[str, Any], model: nn.Module, *, spec: dict[str, Any]) -> None:
    """Put a checkpoint's weights in place.

    Raises:
        CheckpointError: it was trained on other data than `spec` describes, or is of another
            network.
    """
    check_compatible(saved["spec"], spec)
    with _fitting():
        model.load_state_dict(saved["model"])


@contextmanager
def _fitting() -> Iterator[None]:
    """Turn what PyTorch says about state that does not fit into one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise CheckpointError(f"cannot resume: the checkpoint does not fit: {reason}") from error
