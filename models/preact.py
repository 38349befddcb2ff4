"""Preactivation ResNet-18 and SENet-18, in their small-image forms.

Preactivation: He et al., Identity Mappings in Deep Residual Networks, ECCV 2016.
SENet: Hu et al., Squeeze-and-Excitation Networks, CVPR 2018; here a gate in preactivation blocks.
NOTE (differs from He et al.): there is no norm and ReLU before the global average.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .building_blocks import Stem, conv_stem, make_classifier, stack_blocks
from .factory import Layers, Maker
from .resnet import WIDTHS

DEPTH = 2  # blocks per stage, as in ResNet-18


class PreActBlock(nn.Module):
    """Preactivation block: x' + gate(3 x 3, ReLU, norm, 3 x 3, ReLU, norm of x).

    x' is x, or a projection of relu(norm(x)) if shapes differ.

    (N, C, H, W) -> (N, out, H/stride, W/stride).
    """

    def __init__(self, layers: Layers, channels: int, out: int, stride: int, gate: Maker) -> None:
        super().__init__()
        self.norm1 = layers.norm(channels)
        self.conv1 = layers.conv(channels, out, 3, stride=stride, padding=1)
        self.norm2 = layers.norm(out)
        self.conv2 = layers.conv(out, out, 3, padding=1)
        self.gate = gate(out)
        same = stride == 1 and channels == out
        self.projection = None if same else layers.conv(channels, out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return self.gate(y) + (x if self.projection is None else self.projection(active))


def make_preact(
    layers: Layers,
    *,
    in_channels: int,
    num_classes: int,
    stem: Stem = conv_stem,
    gate: Maker = nn.Identity,
) -> nn.Sequential:
    """Make a stem, four stages of two preactivation blocks, global average, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).

    gate(channels) makes a module on the output of a block, before the sum.
    """
    first, channels, blocks = stem(layers, in_channels, WIDTHS[0]), WIDTHS[0], []
    for width in WIDTHS:
        stride = 1 if width == WIDTHS[0] else 2
        blocks += stack_blocks(PreActBlock, layers, channels, width, DEPTH, stride, gate=gate)
        channels = width
    return make_classifier(layers, channels, num_classes, stem=first, blocks=nn.Sequential(*blocks))
