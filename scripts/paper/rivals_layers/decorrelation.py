"""Decorrelated backpropagation: layers that learn to decorrelate their inputs.

Ahmad et al., Constrained Parameter Inference as a Principle for Learning, 2022; Dalm et al.,
Efficient Deep Learning with Decorrelated Backpropagation, 2024. Written from the published rule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SAMPLED = 0.1  # share of the images behind an update


class Decorrelated(nn.Module):
    """Base class of a layer that applies its weight to R x instead of x.

    x are all features of a patch, R is a square matrix that starts as the identity. No gradient
    flows into R, and no mean is subtracted. `decorrelate` updates R after each training step:

        z = R x,  R <- R - lr ((1 - k) C R + k V R)

    C has the off-diagonal elements of the second moment of z, V the diagonal elements minus 1; both
    are means over the patches of the first tenth of the batch.

    Args:
        features: of a patch.
        rate: lr of the update (default 1e-4, as published).
        balance: k, 0 to decorrelate only, 1 to normalise only (default 0.01, as published).
    """

    R: Tensor
    weight: Tensor
    sample: Tensor | None = None  # part of the last training batch, until the update

    def init_decorrelation(self, features: int, rate: float = 1e-4, balance: float = 0.01) -> None:
        self.rate, self.balance = rate, balance
        self.register_buffer("R", torch.eye(features))

    def effective_weight(self) -> Tensor:
        """Return W R in the shape of W."""
        with torch.autocast(self.R.device.type, enabled=False):
            return (self.weight.flatten(1) @ self.R).reshape(self.weight.shape)

    def keep_sample(self, x: Tensor) -> None:
        """Keep the first tenth of a training batch for the update."""
        if self.training:
            self.sample = x[: math.ceil(SAMPLED * len(x))].detach()

    def to_patches(self, x: Tensor) -> Tensor:
        """Return the patches of x as columns (features, M)."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self) -> None:
        """Update R by the kept sample, once."""
        if self.sample is None:
            return
        z = self.R @ self.to_patches(self.sample.to(self.R.dtype))  # F M
        self.sample = None
        k, second = self.balance, z.square().mean(1, keepdim=True)
        # (1 - k) C + k V = (1 - k) z z^T / M + diagonal; the product of three in the cheaper order.
        step = torch.linalg.multi_dot([z, z.mT, self.R]) * ((1 - k) / z.shape[1])
        step += (k * (second - 1) - (1 - k) * second) * self.R
        self.R -= self.rate * step


class DecorrelatedConv2d(Decorrelated, nn.Conv2d):
    """`nn.Conv2d` on decorrelated patches; all patches share one R."""

    def __init__(self, *shape: int, rate: float = 1e-4, balance: float = 0.01, **options: object):
        nn.Conv2d.__init__(self, *shape, **options)
        if self.groups != 1:
            raise ValueError(f"groups must be 1, got {self.groups}")
        self.init_decorrelation(self.weight[0].numel(), rate, balance)

    def to_patches(self, x: Tensor) -> Tensor:
        geometry = {"dilation": self.dilation, "padding": self.padding, "stride": self.stride}
        return F.unfold(x, self.kernel_size, **geometry).transpose(0, 1).flatten(1)

    def forward(self, input: Tensor) -> Tensor:  # named as in torch
        self.keep_sample(input)
        geometry = self.stride, self.padding, self.dilation
        return F.conv2d(input, self.effective_weight(), self.bias, *geometry)


class DecorrelatedLinear(Decorrelated, nn.Linear):
    """`nn.Linear` on decorrelated features."""

    def __init__(self, *shape: int, rate: float = 1e-4, balance: float = 0.01, **options: object):
        nn.Linear.__init__(self, *shape, **options)
        self.init_decorrelation(self.in_features, rate, balance)

    def to_patches(self, x: Tensor) -> Tensor:
        return x.mT

    def forward(self, input: Tensor) -> Tensor:  # named as in torch
        self.keep_sample(input)
        return F.linear(input, self.effective_weight(), self.bias)


def decorrelate(model: nn.Module) -> None:
    """Update R of each layer that has seen a training batch since the last call."""
    for module in model.modules():
        if isinstance(module, Decorrelated):
            module.update()
