"""Training recipe of airbench: optimizer, schedule, augmentation and six views of a test image.

Jordan, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, arXiv 2404.00498, 2024; with Muon (Jordan
2024, https://kellerjordan.github.io/posts/muon). The network is `models/airbench.py`. The recipe
also has label smoothing 0.2 and batches of 2,000, which are flags.

NOTE (differs from the published code): the loss is the mean over the batch instead of the sum, and
rates of SGD are those of the sum times the batch size.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchvision.transforms.v2 import functional

from util.data.sampler import FLIP, LEFT, TOP, random_words
from util.training.resume import Plan

BIAS_RATE, HEAD_RATE = 0.053, 0.67  # of SGD on the loss summed over a batch
DECAY = 2e-6  # weight decay per image of a batch, over the rate
MOMENTUM, MUON_MOMENTUM = 0.85, 0.6
WHITENING_SHARE = 3 / 8  # share of the run in which the bias of the first layer is trained
QUINTIC, QUINTIC_STEPS = (3.4445, -4.7750, 2.0315), 3


class NormalizedMuon(Optimizer):
    """Muon on weights of fixed norm, and SGD with Nesterov momentum on all other parameters.

    Args:
        params: parameter groups. A group with "matrices": True is stepped by Muon.
        lr: learning rate.
        momentum: of SGD and Muon, 0 to below 1.
        weight_decay: L2 penalty of SGD; Muon has none.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float = MOMENTUM, weight_decay: float = 0.0
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "matrices": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step all parameters that have a gradient; `closure` is not supported."""
        if closure is not None:
            raise ValueError("closure is not supported")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, weight: Tensor, group: dict[str, Any]) -> None:
        if "momentum_buffer" not in (state := self.state[weight]):
            state["momentum_buffer"] = torch.zeros_like(weight)
        gradient = weight.grad.add(weight, alpha=group["weight_decay"])
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        update = gradient.add(buffer, alpha=group["momentum"])
        if group["matrices"]:
            weight.mul_(len(weight) ** 0.5 / weight.norm())
            update = orthogonalize(update.flatten(1)).reshape(weight.shape)
        weight.sub_(update, alpha=group["lr"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """Move the singular values of a matrix (O, I) near 1 by a quintic iteration.

    The singular values end in about 0.5 to 1.3, except those far below the largest.
    """
    a, b, c = QUINTIC
    tall = len(matrix) > matrix.shape[1]
    X = matrix.mT if tall else matrix
    X = X / (X.norm() + 1e-7)
    for _ in range(QUINTIC_STEPS):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


def build_optimizer(flags: Namespace, model: nn.Module) -> Optimizer:
    """Return the optimizer; --lr is the rate of the convolutions, which are the first group.

    With Muon and SGD, biases have --bias-rate and the last layer has --head-rate. With AdamW, both
    have --lr.
    The key "share" of a group is the share of the run in which it is trained.
    """
    whitening, head = model.stem[0].bias, model.linear.weight
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    convs = [weight for weight in weights if weight.requires_grad]
    listed = {id(parameter) for parameter in (whitening, head, *convs)}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in listed]
    groups: list[dict[str, Any]] = [
        {"params": convs},
        {"params": [whitening], "rate": flags.bias_rate, "share": WHITENING_SHARE},
        {"params": rest, "rate": flags.bias_rate},
        {"params": [head], "rate": flags.head_rate},
    ]
    for group in groups:
        rate = group.pop("rate", None)
        if rate is not None and flags.optimizer != "AdamW":
            group |= {"lr": rate * flags.batch_size, "weight_decay": DECAY / rate}
    if flags.optimizer == "AdamW":
        return AdamW(groups, lr=flags.lr, weight_decay=flags.weight_decay)
    if flags.optimizer == "SGD":
        decay = {"weight_decay": flags.weight_decay}
        return SGD(groups, lr=flags.lr, momentum=MOMENTUM, nesterov=True, **decay)
    groups[0] |= {"momentum": MUON_MOMENTUM, "matrices": True}
    return NormalizedMuon(groups, lr=flags.lr)


def build_scheduler(
    flags: Namespace, optimizer: Optimizer, plan: Plan, start_step: int
) -> LambdaLR:
    """Return a linear decay to 0 at the end of each group's share of the run."""
    factors = []
    for group in optimizer.param_groups:
        factors.append(partial(_fall, group.get("share", 1) * plan.total_steps))
        group.setdefault("initial_lr", group["lr"])  # LambdaLR requires it unless start_step is 0
    return LambdaLR(optimizer, factors, last_epoch=start_step - 1)


def _fall(end: float, step: int) -> float:
    return max(1 - step / end, 0.0)


@dataclass(frozen=True)
class AlternatingFlip:
    """Flip each image in every second epoch, from a random one on, and shift it at random.

    Attributes:
        shift: largest shift in each direction, in pixels; the border is reflected.
    """

    shift: int = 2

    def __call__(self, images: Tensor, seed: int, epoch: np.ndarray, index: np.ndarray) -> Tensor:
        """Return augmented images (N, C, H, W), each by the seed and its epoch and index (N,)."""

        def draw(epoch: np.ndarray, number: int, below: int) -> Tensor:
            words = random_words(seed, epoch, index, number) % np.uint64(below)
            return torch.from_numpy(words.astype(np.int64))

        first = draw(np.zeros_like(epoch), FLIP, 2)
        flipped = (first + torch.from_numpy(epoch)) % 2 == 1
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        height, width = images.shape[-2:]
        padded = functional.pad(images, [self.shift], padding_mode="reflect")
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # N C P P H W, all views
        top, left = (draw(epoch, number, 2 * self.shift + 1) for number in (TOP, LEFT))
        return windows[torch.arange(len(images)), :, top, left]


class SixViews(nn.Module):
    """Average of a model's logits over six views of each image.

    The image and its mirror image weigh one half together. The image shifted by one pixel up and
    left, the image shifted down and right, and their mirror images weigh the rest.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        padded = F.pad(x, (1, 1, 1, 1), "reflect")
        shifted = padded[..., :height, :width], padded[..., 2:, 2:]
        return self._both(x) / 2 + sum(self._both(view) for view in shifted) / 4

    def _both(self, x: Tensor) -> Tensor:
        return (self.model(x) + self.model(x.flip(-1))) / 2
