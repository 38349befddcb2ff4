"""Parts that several networks share: bottlenecks, shortcuts, gates and stems."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

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
    """Make 1 x 1, 3 x 3 and 1 x 1 convolutions, each with norm, the first two with ReLU.

    (N, channels, H, W) -> (N, out, H/stride, W/stride).

    Args:
        layers: from `make_layers`.
        channels: of the input.
        width: channels of the 3 x 3 convolution.
        out: channels of the output.
        stride: of the 3 x 3 convolution.
        groups: of the 3 x 3 convolution; `width` for a depthwise one.
        max_iter: maximum of Newton-Schulz steps in the 3 x 3 and in the last convolution.
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
    conv = conv_stem(layers, in_channels, width)
    return nn.Sequential(conv, layers.norm(width), nn.ReLU(inplace=True))


def large_stem(layers: Layers, in_channels: int, width: int) -> nn.Module:
    """Make a 7 x 7 convolution of stride 2, norm, ReLU, max-pool.

    (N, in_channels, H, W) -> (N, width, H/4, W/4).
    """
    return nn.Sequential(
        layers.stem(in_channels, width, 7, stride=2, padding=3),
        layers.norm(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
