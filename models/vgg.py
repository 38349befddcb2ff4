"""VGG (Simonyan and Zisserman, 2015): one linear layer for small images, three for large ones."""

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
    """Five stages of 3 x 3 convolutions, averages, hidden linear layers, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).

    The hidden layers are plain in either kind of network: BatchNorm has no place in them that
    deconvolution could take, and the whitened linear layer is the last one alone.

    Args:
        depth: a key of `DEPTHS`.
        side: of the grid of averages that the linear layers look at; 1 for the global average.
        hidden: features of the linear layers before the last.
        dropout_rate: of the features before the last layer, and between hidden ones.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        depth: int,
        in_channels: int = 3,
        num_classes: int = 10,
        side: int = 1,
        hidden: tuple[int, ...] = (),
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(*_stack_stages(layers, in_channels, DEPTHS[depth]))
        self.pool = nn.AdaptiveAvgPool2d(side)  # does nothing at 32 * side
        features = WIDTHS[-1] * side**2
        self.hidden = nn.Sequential(*_stack_hidden(features, hidden, dropout_rate))
        self.dropout = nn.Dropout(dropout_rate)
        self.linear = layers.linear(hidden[-1] if hidden else features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(self.pool(self.features(x)).flatten(1))
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


def _stack_hidden(features: int, widths: Sequence[int], dropout_rate: float) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for width in widths:
        modules += [nn.Linear(features, width), nn.ReLU(inplace=True), nn.Dropout(dropout_rate)]
        features = width
    return modules[:-1]  # the last dropout is the network's own
