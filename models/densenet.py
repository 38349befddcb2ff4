"""DenseNet (Huang et al., Densely Connected Convolutional Networks, CVPR 2017).

The networks for small and for large images differ in the stem only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .building_blocks import conv_stem
from .factory import Layers

# Layers of each dense block.
DEPTHS = {121: (6, 12, 24, 16)}


class DenseLayer(nn.Module):
    """Dense layer, appends `growth` channels: norm, ReLU, 1 x 1; norm, ReLU, 3 x 3.

    (N, C, H, W) -> (N, C + growth, H, W).
    """

    def __init__(self, layers: Layers, channels: int, growth: int) -> None:
        super().__init__()
        width = 4 * growth
        self.norm1 = layers.norm(channels)
        self.conv1 = layers.conv(channels, width, 1)
        self.norm2 = layers.norm(width)
        self.conv2 = layers.conv(width, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        return torch.cat([x, y], dim=1)


def make_transition(layers: Layers, channels: int) -> nn.Module:
    """Make a transition that halves channels and side: (N, C, H, W) -> (N, C/2, H/2, W/2)."""
    return nn.Sequential(
        layers.norm(channels),
        nn.ReLU(),
        layers.conv(channels, channels // 2, 1),
        nn.AvgPool2d(2),
    )


class DenseNet(nn.Module):
    """Stem, dense blocks with transitions between them, global average, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).

    Args:
        layers: from `make_layers`.
        depth: a key of `DEPTHS`.
        growth: channels that each dense layer adds.
        stem: stem(layers, in_channels, width) -> the first layers, see `building_blocks.py`.
        in_channels: channels of the images.
        num_classes: classes of the output.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        depth: int,
        growth: int = 32,
        stem: Callable[..., nn.Module] = conv_stem,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        channels = 2 * growth
        self.stem = stem(layers, in_channels, channels)
        modules: list[nn.Module] = []
        for index, size in enumerate(DEPTHS[depth]):
            if index > 0:
                modules.append(make_transition(layers, channels))
                channels //= 2
            for _ in range(size):
                modules.append(DenseLayer(layers, channels, growth))
                channels += growth
        self.features = nn.Sequential(*modules, layers.norm(channels), nn.ReLU())
        self.linear = layers.linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(self.stem(x))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
