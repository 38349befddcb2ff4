"""Preactivation ResNet (He et al., 2016, Identity Mappings), and SENet-18 (Hu et al., 2018).

The forms for small images that are in common use: SENet-18 has preactivation blocks with a gate.
NOTE (differs from He et al.): no norm and ReLU before the global average, as in that form.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from .building_blocks import conv_stem
from .factory import Layers
from .resnet import WIDTHS

DEPTH = 2  # blocks of each stage, those of ResNet-18


class PreActBlock(nn.Module):
    """x' + gated convolutions: twice norm, ReLU and 3 x 3; x' = x, or projected after the ReLU.

    (N, C, H, W) -> (N, width, H/stride, W/stride).
    """

    def __init__(
        self,
        layers: Layers,
        channels: int,
        width: int,
        stride: int,
        gate: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.norm1 = layers.norm(channels)
        self.conv1 = layers.conv(channels, width, 3, stride=stride, padding=1)
        self.norm2 = layers.norm(width)
        self.conv2 = layers.conv(width, width, 3, padding=1)
        self.gate = gate(width)
        same = stride == 1 and channels == width
        self.projection = None if same else layers.conv(channels, width, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return self.gate(y) + (x if self.projection is None else self.projection(active))


def no_gate(channels: int) -> nn.Module:
    """All channels pass as they are."""
    return nn.Identity()


class PreActResNet(nn.Module):
    """Stem, four stages of two preactivation blocks, global average, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).

    Args:
        stem: stem(layers, in_channels, width) -> the first layers, see `stem.py`.
        gate: gate(channels) -> what the convolutions of a block go through before the sum.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        stem: Callable[..., nn.Module] = conv_stem,
        gate: Callable[[int], nn.Module] = no_gate,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = stem(layers, in_channels, WIDTHS[0])
        channels, blocks = WIDTHS[0], []
        for width in WIDTHS:
            for index in range(DEPTH):
                stride = 2 if index == 0 and width != WIDTHS[0] else 1
                blocks.append(PreActBlock(layers, channels, width, stride, gate))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.linear = layers.linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
