"""DPN-92 (Chen et al., Dual Path Networks, NeurIPS 2017).

Some channels are residual sums, the others grow densely.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .building_blocks import make_bottleneck, make_projection, small_stem
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
        self.out = stage.out
        body_channels = stage.out + stage.growth
        shape = (channels, stage.width, body_channels)
        self.body = make_bottleneck(layers, *shape, stride=stride, groups=GROUPS)
        self.shortcut = (
            make_projection(layers, channels, body_channels, stride) if first else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.shortcut(x), self.body(x)
        total = x[:, : self.out] + y[:, : self.out]
        return F.relu(torch.cat([total, x[:, self.out :], y[:, self.out :]], dim=1))


class DPN(nn.Module):
    """Stem, four stages of dual path blocks, global average, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).
    """

    def __init__(
        self,
        layers: Layers,
        *,
        stages: tuple[Stage, ...] = STAGES,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = small_stem(layers, in_channels, STEM_WIDTH)
        channels, blocks = STEM_WIDTH, []
        for stage in stages:
            for index in range(stage.depth):
                stride = 2 if index == 0 and stage is not stages[0] else 1
                blocks.append(
                    DualPathBlock(layers, channels, stage, stride=stride, first=index == 0)
                )
                channels = stage.out + (index + 2) * stage.growth
        self.blocks = nn.Sequential(*blocks)
        self.linear = layers.linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
