"""Networks of inverted residuals: MobileNet v2 and EfficientNet-B0, in their small-image forms.

MobileNet v2: Sandler et al., Inverted Residuals and Linear Bottlenecks, CVPR 2018.
EfficientNet: Tan and Le, Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019.
NOTE (differs from Tan and Le): EfficientNet-B0 has 3 x 3 kernels and ReLU throughout, and its gates
act on the outputs of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .building_blocks import (
    SqueezeExcitation,
    add_norm_relu,
    make_bottleneck,
    make_classifier,
    make_shortcut,
    small_stem,
    stack_blocks,
)
from .factory import Layers

STEM_WIDTH = 32
# Expansion of the input, output channels, number of blocks, stride of the first block.
Stage = tuple[int, int, int, int]
MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),  # 2 for large images
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
EFFICIENTNET_B0 = (
    (1, 16, 1, 2),
    (6, 24, 2, 1),
    (6, 40, 2, 2),
    (6, 80, 3, 2),
    (6, 112, 3, 1),
    (6, 192, 4, 2),
    (6, 320, 1, 2),
)


class InvertedResidual(nn.Module):
    """Inverted residual: x' + y, or y alone with a stride above 1.

    y is a wide depthwise bottleneck of x; x' is x or a projection of x.

    (N, C, H, W) -> (N, out, H/stride, W/stride).
    """

    def __init__(
        self, layers: Layers, channels: int, out: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        width = expansion * channels
        shape = (channels, width, out)
        # One Newton-Schulz step, as published: with five, MobileNet v2 does not learn. The pixels
        # of a single channel are so correlated that their whitening mostly amplifies noise.
        options = {"groups": width, "max_iter": (1, 1)}
        self.body = make_bottleneck(layers, *shape, stride=stride, **options)
        self.shortcut = make_shortcut(layers, channels, out) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y if self.shortcut is None else y + self.shortcut(x)


class GatedResidual(InvertedResidual):
    """Inverted residual with a gate g: x' + g(y), or y + g(y) with a stride above 1."""

    def __init__(
        self, layers: Layers, channels: int, out: int, stride: int, expansion: int
    ) -> None:
        super().__init__(layers, channels, out, stride, expansion)
        self.gate = SqueezeExcitation(out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.gate(y) + (y if self.shortcut is None else self.shortcut(x))


def make_mobilenet(
    layers: Layers,
    *,
    in_channels: int,
    num_classes: int,
    block: type[InvertedResidual] = InvertedResidual,
    stages: Sequence[Stage] = MOBILENET_V2,
    head: int = 1280,
) -> nn.Sequential:
    """Make a stem, stages of inverted residuals, a 1 x 1 convolution, global average, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).

    Args:
        block: class of the blocks.
        stages: see `Stage`.
        head: channels of the 1 x 1 convolution; 0 for none.
    """
    stem = small_stem(layers, in_channels, STEM_WIDTH)
    channels, modules = STEM_WIDTH, []
    for expansion, out, depth, stride in stages:
        shape = channels, out, depth, stride
        modules += stack_blocks(block, layers, *shape, expansion=expansion)
        channels = out
    if head:
        modules += add_norm_relu(layers, layers.conv(channels, head, 1))
        channels = head
    features = nn.Sequential(*modules)
    return make_classifier(layers, channels, num_classes, stem=stem, features=features)
