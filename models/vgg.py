"""VGG (Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015).

Networks for small images have one linear layer, networks for large images three.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .factory import Layers

WIDTHS = (64, 128, 256, 512, 512)
# Depth -> convolutions per stage; every stage ends in a 2 x 2 max-pool.
DEPTHS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """Five stages of 3 x 3 convolutions, average pooling, hidden linear layers, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).

    The hidden linear layers are plain with either kind of layers, since there is no BatchNorm to
    replace; only the last linear layer whitens.

    Args:
        layers: from `make_layers`.
        depth: a key of `DEPTHS`.
        in_channels: channels of the images.
        num_classes: classes of the output.
        side: of the grid of averages before the linear layers; 1 for the global average.
        hidden: features of each linear layer before the last.
        dropout_rate: probability of dropping a feature after each hidden layer and before the last.
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
        self.pool = nn.AdaptiveAvgPool2d(side)  # the identity at 32 * side
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
    return modules[:-1]  # the last dropout is `VGG.dropout`
