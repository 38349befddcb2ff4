"""Parts that several networks share: stages, bottlenecks, shortcuts, gates, stems, chains."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .factory import Layers, Maker

Stem = Callable[[Layers, int, int], nn.Module]  # stem(layers, in_channels, width)


def chain(**parts: nn.Module) -> nn.Sequential:
    """Chain the parts of a network; their names are those of its checkpoints."""
    return nn.Sequential(OrderedDict(parts))


def average_pool(side: int = 1) -> nn.Sequential:
    """Make an average over a grid of cells: (N, C, H, W) -> (N, C * side**2)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten())


def make_classifier(
    layers: Layers, channels: int, num_classes: int, **parts: nn.Module
) -> nn.Sequential:
    """Chain the parts of a network, a global average and the last linear layer."""
    return chain(**parts, pool=average_pool(), linear=layers.linear(channels, num_classes))


def add_norm_relu(layers: Layers, conv: nn.Module) -> list[nn.Module]:
    """Return a convolution, its norm and ReLU."""
    return [conv, layers.norm(conv.out_channels), nn.ReLU(inplace=True)]


def stack_blocks(
    block: Maker, layers: Layers, channels: int, out: int, depth: int, stride: int, **options: Any
) -> list[nn.Module]:
    """Make block(layers, channels, out, stride, **options) `depth` times, as one stage.

    The first block has the stride and changes the channels.
    """
    shapes = [(channels, out, stride)] + [(out, out, 1)] * (depth - 1)
    return [block(layers, *shape, **options) for shape in shapes]


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
    """Make 1 x 1, 3 x 3 and 1 x 1 convolutions, each with norm, the first two with ReLU.

    (N, channels, H, W) -> (N, out, H/stride, W/stride).

    The 3 x 3 convolution has `width` channels, the stride and the groups. `max_iter` is the maximum
    of Newton-Schulz steps in the 3 x 3 and in the last convolution.
    """
    middle = {"stride": stride, "padding": 1, "groups": groups, "max_iter": max_iter[0]}
    return nn.Sequential(
        *add_norm_relu(layers, layers.conv(channels, width, 1)),
        *add_norm_relu(layers, layers.conv(width, width, 3, **middle)),
        layers.conv(width, out, 1, max_iter=max_iter[1]),
        layers.norm(out),
    )


def make_projection(layers: Layers, channels: int, out: int, stride: int = 1) -> nn.Sequential:
    """Make a 1 x 1 convolution and norm: (N, channels, H, W) -> (N, out, H/stride, W/stride)."""
    return nn.Sequential(layers.conv(channels, out, 1, stride=stride), layers.norm(out))


def make_shortcut(layers: Layers, channels: int, out: int, stride: int = 1) -> nn.Module:
    """Make the shortcut of a residual block: the identity, or a projection if shapes differ."""
    if stride == 1 and channels == out:
        return nn.Identity()
    return make_projection(layers, channels, out, stride)


class SqueezeExcitation(nn.Module):
    """Gate of Squeeze-and-Excitation (Hu et al., 2018): x * sigmoid(MLP(global average of x)).

    (N, C, H, W) -> (N, C, H, W).

    The linear layers are plain with either kind of layers, since there is no BatchNorm to replace.
    NOTE (differs from the published code): there they were whitened.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        scale = self.excite(F.relu(self.squeeze(pooled))).sigmoid()
        return x * scale[:, :, None, None]


def conv_stem(layers: Layers, in_channels: int, width: int) -> nn.Module:
    """Make a 3 x 3 convolution: (N, in_channels, H, W) -> (N, width, H, W)."""
    return layers.stem(in_channels, width, 3, padding=1)


def small_stem(layers: Layers, in_channels: int, width: int) -> nn.Module:
    """Make a 3 x 3 convolution, norm, ReLU: (N, in_channels, H, W) -> (N, width, H, W)."""
    return nn.Sequential(*add_norm_relu(layers, conv_stem(layers, in_channels, width)))


def large_stem(layers: Layers, in_channels: int, width: int) -> nn.Module:
    """Make a 7 x 7 convolution of stride 2, norm, ReLU, max-pool.

    (N, in_channels, H, W) -> (N, width, H/4, W/4).
    """
    conv = layers.stem(in_channels, width, 7, stride=2, padding=3)
    return nn.Sequential(*add_norm_relu(layers, conv), nn.MaxPool2d(3, stride=2, padding=1))
