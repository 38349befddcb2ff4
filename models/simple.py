"""Small networks: linear regression, LeNet-5, three convolutions, multi-layer perceptron.

simple_v1 and mlp: Ye et al., Network Deconvolution, ICLR 2020, experiments on regression and on
fully connected networks. LeNet-5: LeCun et al., Gradient-Based Learning Applied to Document
Recognition, Proceedings of the IEEE 1998.
"""

from __future__ import annotations

from torch import Tensor, nn

from .factory import Layers


def simple_v1(
    layers: Layers,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int = 32,
    method: int | None = None,
) -> nn.Module:
    """Build a linear regression on whole images; with cross-entropy, a logistic regression.

    (N, C, image_size, image_size) -> (N, num_classes).
    """
    return layers.select_method(method).image(in_channels, image_size, num_classes)


class SimpleCNN(nn.Module):
    """Three 3 x 3 convolutions with max-pools, global average, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).
    """

    def __init__(
        self,
        layers: Layers,
        *,
        widths: tuple[int, ...] = (32, 64, 128),
        in_channels: int = 3,
        num_classes: int = 10,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        conv, channels = layers.stem, in_channels
        for width in widths:
            modules += [conv(channels, width, 3, padding=1), layers.norm(width)]
            modules += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
            conv, channels = layers.conv, width
        self.features = nn.Sequential(*modules)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout_rate)
        self.linear = layers.linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(x)).flatten(1)
        return self.linear(self.dropout(x))


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max-pools: two 5 x 5 convolutions, three linear layers.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).

    The hidden linear layers are plain with either kind of layers, as in `VGG`.
    """

    def __init__(self, layers: Layers, *, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for conv, channels, width in ((layers.stem, in_channels, 6), (layers.conv, 6, 16)):
            modules += [conv(channels, width, 5), layers.norm(width)]
            modules += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*modules)
        self.pool = nn.AdaptiveAvgPool2d(5)  # the identity at 32 x 32
        self.hidden = nn.Sequential(
            nn.Linear(16 * 25, 120),
            nn.ReLU(inplace=True),
            nn.Linear(120, 84),
            nn.ReLU(inplace=True),
        )
        self.linear = layers.linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.hidden(self.pool(self.features(x)).flatten(1)))


def mlp(
    layers: Layers,
    *,
    widths: tuple[int, ...] = (128, 128),
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int = 32,
    method: int | None = None,
    dropout_rate: float = 0.0,
) -> nn.Module:
    """Build hidden layers of `widths` features, the first on whole images, and a linear layer.

    (N, C, image_size, image_size) -> (N, num_classes).
    """
    selected = layers.select_method(method)
    modules = [selected.image(in_channels, image_size, widths[0])]
    for index, width in enumerate(widths):
        if index > 0:
            modules.append(selected.hidden(widths[index - 1], width))
        modules += [selected.norm(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules, nn.Dropout(dropout_rate), selected.last(widths[-1], num_classes))
