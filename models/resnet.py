"""ResNet (He et al., Deep Residual Learning for Image Recognition, CVPR 2016).

The networks for small and for large images differ in the stem only.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .building_blocks import Stem, make_classifier, make_shortcut, small_stem, stack_blocks
from .factory import Layers

WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Basic block: relu(x' + 3 x 3, 3 x 3 convolutions of x), x' = x or a projection of x.

    (N, C, H, W) -> (N, out, H/stride, W/stride).
    """

    expansion = 1

    def __init__(self, layers: Layers, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = layers.conv(channels, out, 3, stride=stride, padding=1)
        self.norm1 = layers.norm(out)
        self.conv2 = layers.conv(out, out, 3, padding=1)
        self.norm2 = layers.norm(out)
        self.shortcut = make_shortcut(layers, channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """Bottleneck: relu(x' + 1 x 1, 3 x 3, 1 x 1 convolutions of x), x' = x or a projection of x.

    (N, C, H, W) -> (N, out, H/stride, W/stride).
    """

    expansion = 4

    def __init__(self, layers: Layers, channels: int, out: int, stride: int) -> None:
        super().__init__()
        width = out // self.expansion
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


def make_resnet(
    layers: Layers, *, depth: int, num_classes: int, in_channels: int = 3, stem: Stem = small_stem
) -> nn.Sequential:
    """Make a stem, four stages of residual blocks, global average, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes). `depth` is a key of `DEPTHS`.
    """
    block, depths = DEPTHS[depth]
    first, channels, stages = stem(layers, in_channels, WIDTHS[0]), WIDTHS[0], []
    for width, number in zip(WIDTHS, depths, strict=True):
        out, stride = width * block.expansion, 1 if width == WIDTHS[0] else 2
        blocks = stack_blocks(block, layers, channels, out, number, stride)
        stages.append(nn.Sequential(*blocks))
        channels = out
    return make_classifier(layers, channels, num_classes, stem=first, stages=nn.Sequential(*stages))
