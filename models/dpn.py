"""DPN-92 (Chen et al., Dual Path Networks, NeurIPS 2017).

Some channels are residual sums, the others grow densely.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .building_blocks import make_bottleneck, make_classifier, make_projection, small_stem
from .factory import Layers

STEM_WIDTH, GROUPS = 64, 32


class Stage(NamedTuple):
    """Stage of `depth` blocks: bottleneck width, residual channels, depth, dense growth per block.

    All stages but the first halve the image.
    """

    width: int
    out: int
    depth: int
    growth: int


STAGES = (
    Stage(96, 256, 3, 16),
    Stage(192, 512, 4, 32),
    Stage(384, 1024, 20, 24),
    Stage(768, 2048, 3, 128),
)


class DualPathBlock(nn.Module):
    """Dual path block: ReLU of summed residual channels and concatenated dense channels.

    With y = bottleneck(x) and x' = x, or a projection of x in the first block of a stage, the first
    `out` channels of x' and y are summed and their other channels are concatenated.

    (N, C, H, W) -> (N, D, H/stride, W/stride), with D = out + 2 growth in the first block of a
    stage, else C + growth.
    """

    def __init__(
        self, layers: Layers, channels: int, stage: Stage, *, stride: int, first: bool
    ) -> None:
        super().__init__()
        self.out, both = stage.out, stage.out + stage.growth
        shape = (channels, stage.width, both)
        self.body = make_bottleneck(layers, *shape, stride=stride, groups=GROUPS)
        self.shortcut = make_projection(layers, channels, both, stride) if first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.shortcut(x), self.body(x)
        total = x[:, : self.out] + y[:, : self.out]
        return F.relu(torch.cat([total, x[:, self.out :], y[:, self.out :]], dim=1))


def make_dpn(layers: Layers, *, in_channels: int, num_classes: int) -> nn.Sequential:
    """Make a stem, four stages of dual path blocks, global average, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).
    """
    stem = small_stem(layers, in_channels, STEM_WIDTH)
    channels, blocks = STEM_WIDTH, []
    for stage in STAGES:
        for index in range(stage.depth):
            first = index == 0
            stride = 2 if first and stage is not STAGES[0] else 1
            blocks.append(DualPathBlock(layers, channels, stage, stride=stride, first=first))
            channels = stage.out + (index + 2) * stage.growth
    return make_classifier(layers, channels, num_classes, stem=stem, blocks=nn.Sequential(*blocks))
