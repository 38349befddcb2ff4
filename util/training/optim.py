"""Losses, optimizers and learning rate schedules. Every schedule counts optimizer steps."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from util.errors import RunError
from util.training.muon import Muon

LOSSES = ("CE", "L2")
OPTIMIZERS = ("SGD", "Adam", "AMSGrad", "AdamW", "Muon")
# Defaults of --lr and --weight-decay that differ from those of SGD: those of torch.optim.AdamW.
DECOUPLED = {"lr": 1e-3, "weight_decay": 1e-2}
OPTIMIZER_DEFAULTS = {"AdamW": DECOUPLED, "Muon": DECOUPLED}
MATRIX_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
SCHEDULES = ("cosine", "linear", "multistep", "step")

Criterion = Callable[[Tensor, Tensor], Tensor]


def build_criterion(loss: str, num_classes: int, label_smoothing: float = 0.0) -> Criterion:
    """Return a function of logits (N, classes) and targets, averaged over the batch.

    Targets are (N,) int64, or the shares of the classes (N, classes) float32.

    Args:
        loss: "CE", cross-entropy; or "L2", half the squared distance to the one-hot target, as in
            the published code.
        num_classes: number of classes.
        label_smoothing: share of every target, of "CE", that is spread evenly over all classes.
    """
    if loss == "CE":
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    if loss == "L2":
        return partial(_half_squared_distance, num_classes)
    raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")


def _half_squared_distance(num_classes: int, logits: Tensor, targets: Tensor) -> Tensor:
    shares = F.one_hot(targets, num_classes) if targets.ndim == 1 else targets
    return F.mse_loss(logits, shares.to(logits.dtype), reduction="sum") / (2 * len(targets))


def build_optimizer(
    name: str,
    params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    fused: bool = False,
) -> Optimizer:
    """Return an optimizer of OPTIMIZERS.

    Weight decay is an L2 penalty in SGD, Adam and AMSGrad, and decoupled from the gradient in AdamW
    and Muon.

    Args:
        name: key of OPTIMIZERS.
        params: parameters, or the groups of `group_parameters`.
        lr: learning rate.
        momentum: of SGD alone.
        weight_decay: weight decay.
        fused: step in a kernel that can skip a bad step on a GPU, see `Accelerator.step`. Results
            differ in the last bits. Muon has no such kernel.
    """
    rates = {"lr": lr, "weight_decay": weight_decay}
    if name == "SGD":
        optimizer = SGD(params, **rates, momentum=momentum, fused=fused or None)
        if fused and momentum:
            _clear_momentum(optimizer)
        return optimizer
    if name == "AdamW":
        return AdamW(params, **rates, fused=fused or None)
    if name == "Muon":
        return Muon(params, **rates)
    if name in OPTIMIZERS:
        return Adam(params, **rates, amsgrad=name == "AMSGrad", fused=fused or None)
    raise ValueError(f"optimizer must be one of {OPTIMIZERS}, got {name!r}")


def _clear_momentum(optimizer: SGD) -> None:
    """Set the momentum to 0; torch leaves it uninitialised if the first fused step is skipped."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def group_parameters(
    model: nn.Module, optimizer: str, *, decay_norm_bias: bool = True
) -> list[dict[str, Any]]:
    """Return the parameters of a model in the groups that `build_optimizer` takes.

    Args:
        model: model to train.
        optimizer: name of the optimizer. Muon steps the weights of all convolutions and linear
            layers except the last, the classifier, as matrices.
        decay_norm_bias: False exempts biases and the scales of norms from weight decay, that is all
            parameters of one dimension.

    Raises:
        RunError: Muon has nothing to step, because there is one layer only.
    """
    weights = [layer.weight for layer in model.modules() if isinstance(layer, MATRIX_LAYERS)]
    matrices = set(weights[:-1]) if optimizer == "Muon" else set()
    if optimizer == "Muon" and not matrices:
        raise RunError("--optimizer Muon: the network has no hidden layer; choose AdamW")
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        decays = decay_norm_bias or parameter.ndim > 1
        groups.setdefault((parameter in matrices, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            **({"matrices": True} if is_matrices else {}),
            **({} if decays else {"weight_decay": 0.0}),
        }
        for (is_matrices, decays), parameters in groups.items()
    ]


def build_scheduler(
    name: str,
    optimizer: Optimizer,
    *,
    total_steps: int,
    epoch_steps: int,
    milestones: Sequence[float] = (0.4,),
    gamma: float = 0.1,
    step_size: int = 30,
    warmup_epochs: float = 0.0,
    start_step: int = 0,
) -> LambdaLR:
    """Return a schedule that is a closed form of the optimizer step.

    Args:
        name: "cosine" and "linear" fall from lr to 0; "multistep" multiplies the rate by `gamma` at
            each milestone; "step" does so every `step_size` epochs.
        optimizer: its lr is the rate at the start, or after the warmup.
        total_steps: optimizer steps of the run.
        epoch_steps: optimizer steps of an epoch.
        milestones: see `milestone_steps`.
        gamma: factor of multistep and step.
        step_size: epochs between drops of step.
        warmup_epochs: epochs in which the rate climbs linearly to lr. "cosine" and "linear" fall
            after the warmup; drops stay where they are.
        start_step: finished optimizer steps.
    """
    warmup = round(warmup_epochs * epoch_steps)
    if name == "cosine":
        factor = partial(_cosine, warmup, total_steps)
    elif name == "linear":
        factor = partial(_linear, warmup, total_steps)
    elif name == "multistep":
        factor = partial(_multistep, milestone_steps(milestones, total_steps, epoch_steps), gamma)
    elif name == "step":
        drops = range(step_size * epoch_steps, total_steps, step_size * epoch_steps)
        factor = partial(_multistep, drops, gamma)
    else:
        raise ValueError(f"lr_scheduler must be one of {SCHEDULES}, got {name!r}")
    for group in optimizer.param_groups:  # LambdaLR requires it unless start_step is 0
        group.setdefault("initial_lr", group["lr"])
    return LambdaLR(optimizer, partial(_warm_up, warmup, factor), last_epoch=start_step - 1)


def milestone_steps(milestones: Sequence[float], total_steps: int, epoch_steps: int) -> list[int]:
    """Return the steps at which the rate drops, in order.

    A milestone from 1 upward is an epoch, below 1 a fraction of the run. A single fraction repeats,
    as in the published code: 0.4 means 40 % and 80 %.
    """
    if len(milestones) == 1 and milestones[0] < 1:
        milestones = [k * milestones[0] for k in range(1, math.ceil(1 / milestones[0]))]
    return sorted(round(m * (total_steps if m < 1 else epoch_steps)) for m in milestones)


def _warm_up(warmup: int, factor: Callable[[int], float], step: int) -> float:
    return (step + 1) / (warmup + 1) if step < warmup else factor(step)


def _cosine(start: int, end: int, step: int) -> float:
    return (1 + math.cos(math.pi * _progress(start, end, step))) / 2


def _linear(start: int, end: int, step: int) -> float:
    return 1 - _progress(start, end, step)


def _progress(start: int, end: int, step: int) -> float:
    return min(max(step - start, 0) / max(end - start, 1), 1)


def _multistep(drops: Sequence[int], gamma: float, step: int) -> float:
    return gamma ** bisect_right(drops, step)
