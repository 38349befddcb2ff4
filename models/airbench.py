"""Network of airbench: a frozen whitening layer, then six convolutions in three groups.

Jordan, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, arXiv 2404.00498, 2024.
NOTE (differs from the published code): the network takes images of any size from 32 x 32, and the
images of the first layer are drawn at random rather than the first of the dataset.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .building_blocks import chain
from .factory import Layers
from .registry import LoadImages, init_weights

WIDTHS = (64, 256, 256)  # channels of the groups, each of which halves the image
SIDE = 2  # of the patches that the first layer whitens, in pixels
IMAGES, CHUNK = 5000, 100  # images behind the first layer, and images whose patches fit in memory
EPS = 5e-4  # added to the eigenvalues, in units of variance
NORM = {"eps": 1e-12, "momentum": 0.4}  # of BatchNorm


class PatchWhitening(nn.Conv2d):
    """Frozen convolution that whitens patches; the filters come in pairs of opposite sign.

    (N, C, H, W) -> (N, 8 C, H - 1, W - 1).

    The bias is learned. The filters are random until `init_from_images`.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels, 2 * in_channels * SIDE**2, SIDE)
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def init_from_images(self, load: LoadImages) -> None:
        """Set the filters to +-v / sqrt(e + EPS), for eigenpairs (e, v) of the patches' moments."""
        moments, count = 0, 0
        for images in load(IMAGES).split(CHUNK):
            patches = images.unfold(2, SIDE, 1).unfold(3, SIDE, 1)  # N C H W SIDE SIDE
            rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, self.weight[0].numel())
            moments, count = moments + (rows.mT @ rows).double(), count + len(rows)
        values, vectors = torch.linalg.eigh(moments / count)
        filters = (vectors / (values + EPS).sqrt()).mT.flip(0)  # the largest eigenvalue first
        self.weight.copy_(torch.cat([filters, -filters]).reshape(self.weight.shape))


class Scale(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:g}"


def make_group(layers: Layers, first: nn.Module) -> nn.Sequential:
    """Make the convolution `first`, max-pool, norm, GELU; 3 x 3 convolution, norm, GELU."""
    width = first.out_channels
    second = layers.conv(width, width, 3, padding=1)
    norms = [layers.norm(width, **NORM) for _ in range(2)]
    for norm in norms:
        for name, parameter in norm.named_parameters():
            parameter.requires_grad_(name != "weight")  # only the shift is learned
    return nn.Sequential(first, nn.MaxPool2d(2), norms[0], nn.GELU(), second, norms[1], nn.GELU())


def make_airbench(layers: Layers, *, in_channels: int, num_classes: int) -> nn.Sequential:
    """Make the whitening of 2 x 2 patches, three groups, global maximum, linear.

    (N, C, H, W), at least 32 x 32 -> (N, num_classes).
    """
    whiten = PatchWhitening(in_channels)
    conv, channels, groups = layers.stem, whiten.out_channels, []
    for width in WIDTHS:
        groups.append(make_group(layers, conv(channels, width, 3, padding=1)))
        conv, channels = layers.conv, width
    return chain(
        stem=nn.Sequential(whiten, nn.GELU()),
        groups=nn.Sequential(*groups),
        pool=nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
        linear=layers.linear(channels, num_classes, bias=False),
        scale=Scale(1 / channels),
    )


@torch.no_grad()
def init_airbench(model: nn.Sequential) -> None:
    """Initialise the weights: the first filters of each convolution pass its input channels on.

    All other filters are as in `init_weights`, biases are 0, and the weights of the last layer have
    deviation 1.
    """
    init_weights(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if not isinstance(module, PatchWhitening):
                nn.init.dirac_(module.weight[: module.in_channels])
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    model.linear.weight.div_(model.linear.weight.std())
