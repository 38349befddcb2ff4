"""DenseNet-121 (Huang et al., Densely Connected Convolutional Networks, CVPR 2017).

The networks for small and for large images differ in the stem only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .building_blocks import Stem, conv_stem, make_classifier
from .factory import Layers

DEPTHS = (6, 12, 24, 16)  # layers of each dense block
GROWTH = 32  # channels that each layer adds


class DenseLayer(nn.Module):
    """Dense layer, appends `GROWTH` channels: norm, ReLU, 1 x 1; norm, ReLU, 3 x 3.

    (N, C, H, W) -> (N, C + GROWTH, H, W).
    """

    def __init__(self, layers: Layers, channels: int) -> None:
        super().__init__()
        width = 4 * GROWTH
        self.norm1 = layers.norm(channels)
        self.conv1 = layers.conv(channels, width, 1)
        self.norm2 = layers.norm(width)
        self.conv2 = layers.conv(width, GROWTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        return torch.cat([x, y], dim=1)


def make_transition(layers: Layers, channels: int) -> nn.Module:
    """Make a transition that halves channels and side: (N, C, H, W) -> (N, C/2, H/2, W/2)."""
    conv = layers.conv(channels, channels // 2, 1)
    return nn.Sequential(layers.norm(channels), nn.ReLU(), conv, nn.AvgPool2d(2))


def make_densenet(
    layers: Layers, *, num_classes: int, in_channels: int = 3, stem: Stem = conv_stem
) -> nn.Sequential:
    """Make a stem, dense blocks with transitions between them, global average, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).
    """
    channels = 2 * GROWTH
    first, modules = stem(layers, in_channels, channels), []
    for index, depth in enumerate(DEPTHS):
        if index > 0:
            modules.append(make_transition(layers, channels))
            channels //= 2
        for _ in range(depth):
            modules.append(DenseLayer(layers, channels))
            channels += GROWTH
    features = nn.Sequential(*modules, layers.norm(channels), nn.ReLU())
    return make_classifier(layers, channels, num_classes, stem=first, features=features)
