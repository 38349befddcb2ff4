"""The block that several networks have in common: narrow or widen, look around, and back."""

from __future__ import annotations

from torch import nn

from .factory import Layers


def make_bottleneck(
    layers: Layers,
    channels: int,
    width: int,
    out: int,
    *,
    stride: int = 1,
    groups: int = 1,
    max_iter: tuple[int | None, int | None] = (None, None),
) -> nn.Sequential:
    """1 x 1, 3 x 3 and 1 x 1 convolutions, each with norm, ReLU after the first two.

    (N, channels, H, W) -> (N, out, H/stride, W/stride).

    Args:
        width: channels that the 3 x 3 convolution works on.
        groups: of the 3 x 3 convolution; `width` for a depthwise one.
        max_iter: most Newton-Schulz steps of the 3 x 3 convolution and of the last.
    """
    middle, last = ({"max_iter": steps} for steps in max_iter)
    return nn.Sequential(
        layers.conv(channels, width, 1),
        layers.norm(width),
        nn.ReLU(inplace=True),
        layers.conv(width, width, 3, stride=stride, padding=1, groups=groups, **middle),
        layers.norm(width),
        nn.ReLU(inplace=True),
        layers.conv(width, out, 1, **last),
        layers.norm(out),
    )


def make_projection(layers: Layers, channels: int, out: int, stride: int = 1) -> nn.Sequential:
    """1 x 1 convolution and norm: (N, channels, H, W) -> (N, out, H/stride, W/stride)."""
    return nn.Sequential(layers.conv(channels, out, 1, stride=stride), layers.norm(out))


def make_shortcut(layers: Layers, channels: int, out: int, stride: int = 1) -> nn.Module:
    """What a residual block adds its convolutions to: its input, projected if shapes differ."""
    if stride == 1 and channels == out:
        return nn.Identity()
    return make_projection(layers, channels, out, stride)
