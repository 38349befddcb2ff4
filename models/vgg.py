"""VGG (Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015).

Networks for small images have one linear layer, networks for large images three.
"""

from __future__ import annotations

from torch import nn

from .building_blocks import add_norm_relu, average_pool, chain
from .factory import Layers

WIDTHS = (64, 128, 256, 512, 512)
# Depth -> convolutions per stage; every stage ends in a 2 x 2 max-pool.
DEPTHS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def make_vgg(
    layers: Layers,
    *,
    depth: int,
    num_classes: int,
    in_channels: int = 3,
    side: int = 1,
    hidden: tuple[int, ...] = (),
    dropout_rate: float = 0.0,
) -> nn.Sequential:
    """Make five stages of 3 x 3 convolutions, average pooling, hidden linear layers, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).

    The hidden linear layers are plain with either kind of layers, since there is no BatchNorm to
    replace; only the last linear layer whitens.

    Args:
        depth: a key of `DEPTHS`.
        side: of the grid of averages before the linear layers; 1 for the global average.
        hidden: features of each linear layer before the last.
        dropout_rate: probability of dropping a feature after each hidden layer and before the last.
    """
    modules, conv, channels = [], layers.stem, in_channels
    for width, number in zip(WIDTHS, DEPTHS[depth], strict=True):
        for _ in range(number):
            modules += add_norm_relu(layers, conv(channels, width, 3, padding=1))
            conv, channels = layers.conv, width
        modules.append(nn.MaxPool2d(2))
    linears, features = [], channels * side**2
    for width in hidden:
        linears += [nn.Linear(features, width), nn.ReLU(inplace=True), nn.Dropout(dropout_rate)]
        features = width
    return chain(
        features=nn.Sequential(*modules),
        pool=average_pool(side),  # the identity at 32 * side
        hidden=nn.Sequential(*linears[:-1]),  # the last dropout stands beside the last linear layer
        dropout=nn.Dropout(dropout_rate),
        linear=layers.linear(features, num_classes),
    )
