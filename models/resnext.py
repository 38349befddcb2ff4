"""ResNeXt-29 (Xie et al., Aggregated Residual Transformations, CVPR 2017).

Bottlenecks with grouped 3 x 3 convolutions.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .building_blocks import make_bottleneck, make_shortcut
from .factory import Layers

STEM_WIDTH = 64
DEPTHS = (3, 3, 3)  # blocks per stage; all stages but the first halve the image


class ResNeXtBlock(nn.Module):
    """ResNeXt block: relu(x' + bottleneck(x)), x' = x or a projection of x.

    (N, C, H, W) -> (N, 2 * width, H/stride, W/stride).
    """

    def __init__(
        self, layers: Layers, channels: int, width: int, *, stride: int, groups: int
    ) -> None:
        super().__init__()
        shape = (channels, width, 2 * width)
        options = {"groups": groups, "max_iter": (3, None)}  # as published
        self.body = make_bottleneck(layers, *shape, stride=stride, **options)
        self.shortcut = make_shortcut(layers, channels, 2 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class ResNeXt(nn.Module):
    """Stem, three stages of grouped bottlenecks, global average, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).

    The stem is a 1 x 1 convolution, as in the common form for small images.

    Args:
        layers: from `make_layers`.
        groups: of the 3 x 3 convolutions.
        group_width: channels of a group in the first stage; each further stage doubles them.
        in_channels: channels of the images.
        num_classes: classes of the output.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        groups: int = 32,
        group_width: int = 4,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            layers.stem(in_channels, STEM_WIDTH, 1), layers.norm(STEM_WIDTH), nn.ReLU(inplace=True)
        )
        channels, blocks = STEM_WIDTH, []
        for stage, depth in enumerate(DEPTHS):
            width = groups * group_width * 2**stage
            for index in range(depth):
                stride = 2 if index == 0 and stage > 0 else 1
                blocks.append(ResNeXtBlock(layers, channels, width, stride=stride, groups=groups))
                channels = 2 * width
        self.blocks = nn.Sequential(*blocks)
        self.linear = layers.linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
