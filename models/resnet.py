"""ResNet (He et al., Deep Residual Learning for Image Recognition, CVPR 2016).

The networks for small and for large images differ in the stem only.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from .building_blocks import make_shortcut, small_stem
from .factory import Layers

WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Basic block: relu(x' + 3 x 3, 3 x 3 convolutions of x), x' = x or a projection of x.

    (N, C, H, W) -> (N, width, H/stride, W/stride).
    """

    expansion = 1

    def __init__(self, layers: Layers, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = layers.conv(channels, width, 3, stride=stride, padding=1)
        self.norm1 = layers.norm(width)
        self.conv2 = layers.conv(width, width, 3, padding=1)
        self.norm2 = layers.norm(width)
        self.shortcut = make_shortcut(layers, channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """Bottleneck: relu(x' + 1 x 1, 3 x 3, 1 x 1 convolutions of x), x' = x or a projection of x.

    (N, C, H, W) -> (N, 4 * width, H/stride, W/stride).
    """

    expansion = 4

    def __init__(self, layers: Layers, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = self.expansion * width
        self.conv1 = layers.conv(channels, width, 1)
        self.norm1 = layers.norm(width)
        self.conv2 = layers.conv(width, width, 3, stride=stride, padding=1)
        self.norm2 = layers.norm(width)
        self.conv3 = layers.conv(width, out, 1)
        self.norm3 = layers.norm(out)
        self.shortcut = make_shortcut(layers, channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return F.relu(y + self.shortcut(x))


Block = type[BasicBlock] | type[Bottleneck]
# Depth -> block and its number in each stage; all stages but the first halve the image.
DEPTHS: dict[int, tuple[Block, tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


def _make_stage(
    layers: Layers, block: Block, channels: int, width: int, depth: int, stride: int
) -> nn.Module:
    """Make `depth` residual blocks; the first has the stride and changes the channels."""
    inputs = [channels] + [width * block.expansion] * (depth - 1)
    strides = [stride] + [1] * (depth - 1)
    return nn.Sequential(
        *(block(layers, c, width, s) for c, s in zip(inputs, strides, strict=True))
    )


class ResNet(nn.Module):
    """Stem, four stages of residual blocks, global average, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).

    Args:
        layers: from `make_layers`.
        depth: a key of `DEPTHS`.
        stem: stem(layers, in_channels, width) -> the first layers, see `building_blocks.py`.
        in_channels: channels of the images.
        num_classes: classes of the output.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        depth: int,
        stem: Callable[..., nn.Module] = small_stem,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        block, depths = DEPTHS[depth]
        self.stem = stem(layers, in_channels, WIDTHS[0])
        channels, stages = WIDTHS[0], []
        for width, blocks in zip(WIDTHS, depths, strict=True):
            stride = 1 if width == WIDTHS[0] else 2
            stages.append(_make_stage(layers, block, channels, width, blocks, stride))
            channels = width * block.expansion
        self.stages = nn.Sequential(*stages)
        self.linear = layers.linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
