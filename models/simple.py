"""Small networks: linear regression, LeNet-5, three convolutions, multi-layer perceptron.

simple_v1 and mlp: Ye et al., Network Deconvolution, ICLR 2020, experiments on regression and on
fully connected networks. LeNet-5: LeCun et al., Gradient-Based Learning Applied to Document
Recognition, Proceedings of the IEEE 1998.
"""

from __future__ import annotations

from torch import nn

from .building_blocks import add_norm_relu, average_pool, chain
from .factory import Layers

HIDDEN = 128  # features of each hidden layer of the multi-layer perceptron


def make_regression(
    layers: Layers,
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
    method: int | None = None,
) -> nn.Module:
    """Make a linear regression on whole images; with cross-entropy, a logistic regression.

    (N, C, image_size, image_size) -> (N, num_classes).
    """
    return layers.select_method(method).image(in_channels, image_size, num_classes)


def make_simple_cnn(
    layers: Layers, *, in_channels: int, num_classes: int, dropout_rate: float = 0.0
) -> nn.Sequential:
    """Make three 3 x 3 convolutions with max-pools, global average, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).
    """
    modules, conv, channels = [], layers.stem, in_channels
    for width in (32, 64, 128):
        modules += add_norm_relu(layers, conv(channels, width, 3, padding=1))
        modules.append(nn.MaxPool2d(2))
        conv, channels = layers.conv, width
    return chain(
        features=nn.Sequential(*modules),
        pool=average_pool(),
        dropout=nn.Dropout(dropout_rate),
        linear=layers.linear(channels, num_classes),
    )


def make_lenet(layers: Layers, *, in_channels: int, num_classes: int) -> nn.Sequential:
    """Make LeNet-5 with ReLU and max-pools: two 5 x 5 convolutions, three linear layers.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).

    The hidden linear layers are plain with either kind of layers, as in VGG.
    """
    features = nn.Sequential(
        *add_norm_relu(layers, layers.stem(in_channels, 6, 5)),
        nn.MaxPool2d(2),
        *add_norm_relu(layers, layers.conv(6, 16, 5)),
        nn.MaxPool2d(2),
    )
    hidden = nn.Sequential(
        nn.Linear(16 * 25, 120), nn.ReLU(inplace=True), nn.Linear(120, 84), nn.ReLU(inplace=True)
    )
    return chain(
        features=features,
        pool=average_pool(5),  # the identity at 32 x 32
        hidden=hidden,
        linear=layers.linear(84, num_classes),
    )


def make_mlp(
    layers: Layers,
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
    method: int | None = None,
    dropout_rate: float = 0.0,
) -> nn.Sequential:
    """Make two hidden layers of `HIDDEN` features, the first on whole images, and a linear layer.

    (N, C, image_size, image_size) -> (N, num_classes).
    """
    selected = layers.select_method(method)
    return nn.Sequential(
        selected.image(in_channels, image_size, HIDDEN),
        selected.norm(HIDDEN),
        nn.ReLU(inplace=True),
        selected.hidden(HIDDEN, HIDDEN),
        selected.norm(HIDDEN),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout_rate),
        selected.last(HIDDEN, num_classes),
    )
