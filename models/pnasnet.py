"""PNASNet (Liu et al., 2018), the two small forms A and B for small images in common use."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .building_blocks import make_projection, small_stem
from .factory import Layers

DEPTH = 6  # cells of each of the three stages, between which one cell halves the image


def make_depthwise(
    layers: Layers, channels: int, out: int, kernel_size: int, stride: int
) -> nn.Module:
    """A convolution of each channel by itself, and norm; `out` is a multiple of `channels`."""
    padding = kernel_size // 2
    options = {"stride": stride, "padding": padding, "groups": channels}
    return nn.Sequential(layers.conv(channels, out, kernel_size, **options), layers.norm(out))


def make_pool(layers: Layers, channels: int, out: int, stride: int) -> nn.Module:
    """3 x 3 max-pool; with a stride, a projection to `out` channels behind it."""
    pool = nn.MaxPool2d(3, stride=stride, padding=1)
    return pool if stride == 1 else nn.Sequential(pool, make_projection(layers, channels, out))


class CellA(nn.Module):
    """relu(7 x 7 depthwise + max-pool): (N, C, H, W) -> (N, out, H/stride, W/stride)."""

    def __init__(self, layers: Layers, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv = make_depthwise(layers, channels, out, 7, stride)
        self.pool = make_pool(layers, channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + self.pool(x))


class CellB(nn.Module):
    """relu of 1 x 1 on two branches: 7 x 7 + 3 x 3 depthwise, and max-pool + 5 x 5 depthwise.

    Both are rectified before. (N, C, H, W) -> (N, out, H/stride, W/stride).
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


class PNASNet(nn.Module):
    """Stem, three stages of six cells with a halving cell between any two, average, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).

    Args:
        width: channels of the first stage; each further one has twice as many.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        cell: type[CellA] | type[CellB],
        width: int,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = small_stem(layers, in_channels, width)
        cells = [cell(layers, width, width, 1) for _ in range(DEPTH)]
        for wide in (2 * width, 4 * width):
            cells.append(cell(layers, wide // 2, wide, 2))
            cells += [cell(layers, wide, wide, 1) for _ in range(DEPTH)]
        self.cells = nn.Sequential(*cells)
        self.linear = layers.linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cells(self.stem(x))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
