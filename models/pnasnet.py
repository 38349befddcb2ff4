"""PNASNet (Liu et al., Progressive Neural Architecture Search, ECCV 2018).

A and B are the two variants in common use for small images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .building_blocks import make_classifier, make_projection, small_stem, stack_blocks
from .factory import Layers, Maker

DEPTH = 6  # cells per stage, besides the halving cell that begins the second and the third


def make_depthwise(
    layers: Layers, channels: int, out: int, kernel_size: int, stride: int
) -> nn.Module:
    """Make a depthwise convolution and norm; `out` is a multiple of `channels`."""
    padding = kernel_size // 2
    options = {"stride": stride, "padding": padding, "groups": channels}
    return nn.Sequential(layers.conv(channels, out, kernel_size, **options), layers.norm(out))


def make_pool(layers: Layers, channels: int, out: int, stride: int) -> nn.Module:
    """Make a 3 x 3 max-pool, followed by a projection if it has a stride."""
    pool = nn.MaxPool2d(3, stride=stride, padding=1)
    return pool if stride == 1 else nn.Sequential(pool, make_projection(layers, channels, out))


class CellA(nn.Module):
    """Cell A, relu(7 x 7 depthwise + max-pool): (N, C, H, W) -> (N, out, H/stride, W/stride)."""

    def __init__(self, layers: Layers, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv = make_depthwise(layers, channels, out, 7, stride)
        self.pool = make_pool(layers, channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + self.pool(x))


class CellB(nn.Module):
    """Cell B, relu(1 x 1(relu(left), relu(right))).

    left is 7 x 7 + 3 x 3 depthwise; right is max-pool + 5 x 5 depthwise.

    (N, C, H, W) -> (N, out, H/stride, W/stride).
    """

    def __init__(self, layers: Layers, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv7, self.conv3, self.conv5 = (
            make_depthwise(layers, channels, out, size, stride) for size in (7, 3, 5)
        )
        self.pool = make_pool(layers, channels, out, stride)
        self.merge = make_projection(layers, 2 * out, out)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv7(x) + self.conv3(x), self.pool(x) + self.conv5(x)
        return F.relu(self.merge(F.relu(torch.cat([left, right], dim=1))))


def make_pnasnet(
    layers: Layers, *, in_channels: int, num_classes: int, cell: Maker, width: int
) -> nn.Sequential:
    """Make a stem, three stages of six cells with a halving cell between them, average, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).

    The first stage has `width` channels; each further stage doubles them.
    """
    stem = small_stem(layers, in_channels, width)
    cells = stack_blocks(cell, layers, width, width, DEPTH, stride=1)
    for out in (2 * width, 4 * width):
        cells += stack_blocks(cell, layers, out // 2, out, DEPTH + 1, stride=2)
    return make_classifier(layers, 4 * width, num_classes, stem=stem, cells=nn.Sequential(*cells))
