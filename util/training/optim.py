"""What is minimised, by which rule, at which rate. Every schedule counts optimizer steps."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

LOSSES = ("CE", "L2")
OPTIMIZERS = ("SGD", "Adam", "AMSGrad")
SCHEDULES = ("cosine", "multistep", "step")

Criterion = Callable[[Tensor, Tensor], Tensor]


def build_criterion(loss: str, num_classes: int) -> Criterion:
    """criterion(logits (N, classes), targets (N,) int64) -> scalar, averaged over the batch.

    CE is the cross-entropy; L2 half the squared distance to the one-hot target, as published.

    Raises:
        ValueError: an unknown loss.
    """
    if loss == "CE":
        return nn.CrossEntropyLoss()
    if loss == "L2":
        return partial(_half_squared_distance, num_classes)
    raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")


def _half_squared_distance(num_classes: int, logits: Tensor, targets: Tensor) -> Tensor:
    wanted = F.one_hot(targets, num_classes).to(logits.dtype)
    return F.mse_loss(logits, wanted, reduction="sum") / (2 * len(targets))


def build_optimizer(
    name: str,
    params: Iterable[nn.Parameter],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> Optimizer:
    """SGD with momentum, Adam or AMSGrad (which have their own), all with L2 weight decay.

    Raises:
        ValueError: an unknown name.
    """
    if name == "SGD":
        return SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if name in OPTIMIZERS:
        return Adam(params, lr=lr, weight_decay=weight_decay, amsgrad=name == "AMSGrad")
    raise ValueError(f"optimizer must be one of {OPTIMIZERS}, got {name!r}")


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
    """The learning rate as a function of the optimizer steps done; call `step()` after each.

    cosine falls from lr to 0 over `total_steps`; multistep multiplies by `gamma` at each milestone
    (see `milestone_steps`), step at every `step_size` epochs. During the first `warmup_epochs` the
    rate climbs in a straight line to lr; cosine begins its fall after them, drops stay where they
    are. The rate is a closed form of the step, so a resumed run needs only `start_step`, the steps
    already done.

    Raises:
        ValueError: an unknown name.
    """
    warmup = round(warmup_epochs * epoch_steps)
    if name == "cosine":
        factor = partial(_cosine, warmup, total_steps)
    elif name == "multistep":
        factor = partial(_multistep, milestone_steps(milestones, total_steps, epoch_steps), gamma)
    elif name == "step":
        drops = range(step_size * epoch_steps, total_steps, step_size * epoch_steps)
        factor = partial(_multistep, drops, gamma)
    else:
        raise ValueError(f"lr_scheduler must be one of {SCHEDULES}, got {name!r}")
    for group in optimizer.param_groups:  # a fresh optimizer may begin late
        group.setdefault("initial_lr", group["lr"])
    climb = partial(_warm_up, warmup, factor)
    return LambdaLR(optimizer, climb, last_epoch=start_step - 1)


def milestone_steps(milestones: Sequence[float], total_steps: int, epoch_steps: int) -> list[int]:
    """Steps at which the rate drops, in order.

    A milestone from 1 upward is an epoch. One below 1 is a fraction of the run, and a single one
    repeats, as the published 0.4 does: at 40 % and at 80 %.
    """
    if len(milestones) == 1 and milestones[0] < 1:
        milestones = [k * milestones[0] for k in range(1, math.ceil(1 / milestones[0]))]
    return sorted(round(m * (total_steps if m < 1 else epoch_steps)) for m in milestones)


def _warm_up(warmup: int, factor: Callable[[int], float], step: int) -> float:
    return (step + 1) / (warmup + 1) if step < warmup else factor(step)


def _cosine(start: int, end: int, step: int) -> float:
    done = min(max(step - start, 0) / max(end - start, 1), 1)
    return (1 + math.cos(math.pi * done)) / 2


def _multistep(drops: Sequence[int], gamma: float, step: int) -> float:
    return gamma ** bisect_right(drops, step)
