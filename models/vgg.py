"""VGG for small pictures (Simonyan and Zisserman, 2015): one linear layer instead of three."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .factory import Layers

WIDTHS = (64, 128, 256, 512, 512)
# Convolutions per stage; every stage ends in a 2 x 2 max-pool.
DEPTHS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """Five stages of 3 x 3 convolutions, global average, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).
    """

    def __init__(
        self,
        layers: Layers,
        *,
        depth: int,
        in_channels: int = 3,
        num_classes: int = 10,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(*_stack_stages(layers, in_channels, DEPTHS[depth]))
        self.pool = nn.AdaptiveAvgPool2d(1)  # does nothing at 32 x 32
        self.dropout = nn.Dropout(dropout_rate)
        self.linear = layers.linear(WIDTHS[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(x)).flatten(1)  # N 512
        return self.linear(self.dropout(x))


def _stack_stages(layers: Layers, channels: int, depths: Sequence[int]) -> list[nn.Module]:
    modules: list[nn.Module] = []
    conv = layers.stem
    for width, depth in zip(WIDTHS, depths, strict=True):
        for _ in range(depth):
            modules += [conv(channels, width, 3, padding=1), layers.norm(width)]
            modules.append(nn.ReLU(inplace=True))
            conv, channels = layers.conv, width
        modules.append(nn.MaxPool2d(2))
    return modules
