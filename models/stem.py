"""How a network begins: the first layers, for small pictures and for large ones."""

from __future__ import annotations

from torch import nn

from .factory import Layers


def conv_stem(layers: Layers, in_channels: int, width: int) -> nn.Module:
    """One 3 x 3 convolution: (N, in_channels, H, W) -> (N, width, H, W)."""
    return layers.stem(in_channels, width, 3, padding=1)


def small_stem(layers: Layers, in_channels: int, width: int) -> nn.Module:
    """3 x 3, norm, ReLU: (N, in_channels, H, W) -> (N, width, H, W)."""
    conv = conv_stem(layers, in_channels, width)
    return nn.Sequential(conv, layers.norm(width), nn.ReLU(inplace=True))


def large_stem(layers: Layers, in_channels: int, width: int) -> nn.Module:
    """7 x 7 of stride 2, norm, ReLU, max-pool: (N, in_channels, H, W) -> (N, width, H/4, W/4)."""
    return nn.Sequential(
        layers.stem(in_channels, width, 7, stride=2, padding=3),
        layers.norm(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
