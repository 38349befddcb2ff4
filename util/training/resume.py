"""How far a run has come: counted, put into a checkpoint, taken up again."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from util.checkpoint.store import check_compatible
from util.checkpoint.validators import describe
from util.errors import CheckpointError, ContentError
from util.training.accelerator import Accelerator
from util.training.metrics import EpochMetrics, Metrics


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
    latest: Metrics = field(default_factory=dict)

    def finish_epoch(self, train: Metrics, test: Metrics) -> None:
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
    done: Progress,
    meters: EpochMetrics,
    model: nn.Module,
    optimizer: Optimizer,
    accelerator: Accelerator,
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
        "scaler": accelerator.state_dict(),
    }


def restore(
    saved: dict[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    accelerator: Accelerator,
    *,
    file: str,
    spec: dict[str, Any],
    images: dict[str, int],
    epoch_steps: int,
    total_steps: int,
) -> tuple[Progress, EpochMetrics]:
    """Put a checkpoint's weights and optimizer state in place; returns how far it had come.

    Args:
        saved: the content of `file`.
        images: how many there are; one more or less and all come in another order.

    Raises:
        CheckpointError: it was trained on other data than `spec` describes or on another number of
            `images`, is of another network, or its last epoch was cut short by --max-steps, and
            some of `total_steps` are to go.
    """
    check_compatible(saved.get("images", images), images)  # younger than some checkpoints
    done, meters = Progress(**saved["progress"]), EpochMetrics(saved["meters"])
    for name, steps, most in (
        ("progress.step", done.step, done.epoch * epoch_steps),
        ("meters.rows", meters.steps, epoch_steps),
    ):
        if steps > most:
            raise CheckpointError(
                f"cannot resume: {file}: {name} has {steps} steps, in {done.epoch} epochs of "
                f"{epoch_steps} there are {most}"
            )
    if done.step < total_steps and done.step != done.epoch * epoch_steps:
        raise CheckpointError(
            f"cannot resume: epoch {done.epoch} of the checkpoint was ended by --max-steps, at "
            f"step {done.step} in the middle of {epoch_steps}; continue one of before"
        )
    restore_model(saved, model, file=file, spec=spec)
    with _fitting(file):
        _check_state(saved["optimizer"], optimizer)
        buffers = dict(model.named_buffers())
        for rank, own in enumerate(saved.get("own_buffers", ())):
            _check_tensors(f"own_buffers[{rank}]", own, buffers)
        # Only the state: settings are those of the flags, the rate is a closed form of the step.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
        accelerator.load_state_dict(saved["scaler"])
    return done, meters


def restore_model(
    saved: dict[str, Any], model: nn.Module, *, file: str, spec: dict[str, Any]
) -> None:
    """Put the weights of a checkpoint, the content of `file`, in place.

    Raises:
        CheckpointError: it was trained on other data than `spec` describes, or is of another
            network.
    """
    check_compatible(saved["spec"], spec)
    with _fitting(file):
        for name, current in model.state_dict().items():
            found = saved["model"].get(name, current)
            if found.dtype != current.dtype:  # it would be rounded; shapes torch looks at
                raise ContentError(f"model.{name} is {describe(found)}, not {describe(current)}")
        model.load_state_dict(saved["model"])


def _check_state(saved: dict[str, Any], optimizer: Optimizer) -> None:
    """See that the state of an optimizer is one that this one could have come to."""
    groups = [list(group["params"]) for group in saved["param_groups"]]
    mine = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    if groups != mine:
        sizes = " and ".join(str([len(group) for group in one]) for one in (groups, mine))
        raise ContentError(f"optimizer.param_groups differ, of sizes {sizes} here")
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, state in saved["state"].items():
        if number not in range(len(params)):
            raise ContentError(f"optimizer.state.{number} is of no parameter")
        state = {name: value for name, value in state.items() if value is not None}
        kept = _try_step(optimizer, params[number])
        if state and state.keys() != kept.keys():
            names = " and ".join(f"({', '.join(one)})" for one in (state, kept))
            raise ContentError(f"optimizer.state.{number} differs, of {names} here")
        _check_tensors(f"optimizer.state.{number}", state, kept)


def _try_step(optimizer: Optimizer, like: nn.Parameter) -> dict[str, Tensor]:
    """What an optimizer of this kind keeps for a parameter: of its shape, but on no device."""
    parameter = nn.Parameter(torch.zeros_like(like, device="meta"))
    parameter.grad = torch.zeros_like(parameter)
    twin = type(optimizer)([parameter], **optimizer.defaults)
    twin.step()
    return twin.state[parameter]


def _check_tensors(place: str, found: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
    """See that all are known by name, and of the shape and type of those that are known."""
    for name, value in found.items():
        if name not in known:
            raise ContentError(f"{place}.{name} is not known")
        if (value.shape, value.dtype) != (known[name].shape, known[name].dtype):
            raise ContentError(f"{place}.{name} is {describe(value)}, not {describe(known[name])}")


@contextmanager
def _fitting(file: str) -> Iterator[None]:
    """Turn what PyTorch says about state that does not fit into one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise CheckpointError(f"cannot resume: {file} does not fit: {reason}") from error
