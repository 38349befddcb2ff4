"""Continue a run: reopen an epoch that --max-steps cut short, and name the position."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from util.training.metrics import EpochMetrics
from util.training.resume import Plan, TrainingState


def reopen_epoch(saved: dict[str, Any], epoch_steps: int) -> dict[str, Any]:
    """Return the checkpoint `saved` as it was before the end of its last epoch, if that was cut.

    The steps of the cut epoch become an epoch under way, and its row leaves the history. Its test
    still counts for the best accuracy, since the best checkpoint may be the one of this test.
    Other checkpoints are returned unchanged. `epoch_steps` is the length of a whole epoch.
    """
    progress, history = saved["progress"], saved["history"]
    epoch = progress["epoch"] - 1
    steps = progress["step"] - epoch * epoch_steps
    if not (history["epoch"] and 0 < steps < epoch_steps):
        return saved
    last = {key: values[-1] for key, values in history.items()}
    history = {key: values[:-1] for key, values in history.items()}
    cut = saved.get("cut")
    if not cut or len(cut["rows"]) != steps:
        cut = _spread(last, steps, saved["config"])
    reopened = {
        "epoch": epoch,
        "step": progress["step"] - steps,
        "images": progress["images"] - EpochMetrics(cut).average()["images"],
        "train_seconds": progress["train_seconds"] - last["train_seconds"],
        "test_seconds": progress["test_seconds"]
        - last["test_seconds"]
        - last.get("val_seconds", 0),
        "latest": {key: history[key][-1] for key in progress["latest"] if history["epoch"]},
    }
    reopened = {**progress, **reopened}
    return {**saved, "epoch": epoch, "progress": reopened, "meters": cut, "history": history}


def _spread(last: dict[str, float], steps: int, config: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of an epoch as equal steps, for a checkpoint that lacks its steps."""
    loss, top1, top5 = last["train_loss"], last["train_top1"] / 100, last["train_top5"] / 100
    row = torch.tensor([1.0, loss, top1, top5], dtype=torch.float64) * config["batch_size"]
    return {"rows": row.repeat(steps, 1), "lr": last["train_lr"], "seconds": last["train_seconds"]}


def describe_position(
    flags: Namespace,
    config: Mapping[str, Any],
    state: TrainingState,
    plan: Plan,
    scheduler: LRScheduler,
) -> str:
    """Return a line on the step from which a run continues, and on a change of its schedule."""
    epoch, total = state.progress.epoch, plan.total_steps
    place = f"in epoch {epoch + 1}" if state.metrics.steps else f"after epoch {epoch}"
    line = f"resuming from {flags.resume}, step {state.step} of {total}, {place}"
    before = min(config["epochs"] * plan.epoch_steps, config.get("max_steps") or sys.maxsize)
    if before == total:
        return line
    return (
        f"{line}; the {flags.lr_scheduler} schedule now spans {total} steps instead of {before}, "
        f"with a learning rate of {scheduler.get_last_lr()[0]:.3g} here"
    )
