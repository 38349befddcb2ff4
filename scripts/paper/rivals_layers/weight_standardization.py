"""Scaled weight standardisation: a convolution that needs no normalisation behind it.

Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight Standardization, 2019;
scaled as by Brock et al., Characterizing Signal Propagation to Close the Performance Gap in
Unnormalized ResNets, ICLR 2021. Written from the published rule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# 1 / deviation of the activation of a normal number: a layer then keeps the variance.
GAINS = {"identity": 1.0, "relu": math.sqrt(2 / (1 - 1 / math.pi)), "gelu": 1.7009262434}
EPS = 1e-4  # smallest variance times fan-in of a filter


class StandardizedConv2d(nn.Conv2d):
    """Convolution by filters of mean 0 and variance 1 / fan-in, times learned gains.

        y = conv(x, activation gain * gain * (W - mean(W)) / sqrt(fan_in * var(W))) + bias

    Mean and variance are over the weights of each filter. The gains start at 1.

    Args:
        activation: a key of `GAINS`, of the activation before this layer (default "relu").
        learn_gain: learn the gains (default True).
        *shape, **options: as in `torch.nn.Conv2d`.
    """

    def __init__(
        self, *shape: int, activation: str = "relu", learn_gain: bool = True, **options: object
    ) -> None:
        super().__init__(*shape, **options)
        self.factor = GAINS[activation]
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1), learn_gain)

    def effective_weight(self) -> Tensor:
        """Return the weight that acts on the input."""
        fan_in = self.weight[0].numel()
        var, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        scale = (var * fan_in).clamp(min=EPS).rsqrt() * self.gain * self.factor
        return (self.weight - mean) * scale

    def forward(self, input: Tensor) -> Tensor:  # named as in torch
        geometry = self.stride, self.padding, self.dilation, self.groups
        return F.conv2d(input, self.effective_weight(), self.bias, *geometry)
