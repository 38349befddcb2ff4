"""ResNeXt-29 32x4d (Xie et al., Aggregated Residual Transformations, CVPR 2017).

Bottlenecks with grouped 3 x 3 convolutions.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .building_blocks import (
    add_norm_relu,
    make_bottleneck,
    make_classifier,
    make_shortcut,
    stack_blocks,
)
from .factory import Layers

STEM_WIDTH = 64
GROUPS = 32  # of the 3 x 3 convolutions
WIDTHS = (256, 512, 1024)  # channels of each stage; all stages but the first halve the image
DEPTH = 3  # blocks per stage


class ResNeXtBlock(nn.Module):
    """ResNeXt block: relu(x' + bottleneck(x)), x' = x or a projection of x.

    (N, C, H, W) -> (N, out, H/stride, W/stride).
    """

    def __init__(self, layers: Layers, channels: int, out: int, stride: int) -> None:
        super().__init__()
        options = {"groups": GROUPS, "max_iter": (3, None)}  # as published
        self.body = make_bottleneck(layers, channels, out // 2, out, stride=stride, **options)
        self.shortcut = make_shortcut(layers, channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def make_resnext(layers: Layers, *, in_channels: int, num_classes: int) -> nn.Sequential:
    """Make a stem, three stages of grouped bottlenecks, global average, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).

    The stem is a 1 x 1 convolution, as in the common form for small images.
    """
    stem = nn.Sequential(*add_norm_relu(layers, layers.stem(in_channels, STEM_WIDTH, 1)))
    channels, blocks = STEM_WIDTH, []
    for width in WIDTHS:
        stride = 1 if width == WIDTHS[0] else 2
        blocks += stack_blocks(ResNeXtBlock, layers, channels, width, DEPTH, stride)
        channels = width
    return make_classifier(layers, channels, num_classes, stem=stem, blocks=nn.Sequential(*blocks))
