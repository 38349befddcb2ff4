"""Table of networks for small images, from 32 x 32 pixels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from .airbench import init_airbench, make_airbench
from .building_blocks import SqueezeExcitation, small_stem
from .densenet import make_densenet
from .dpn import make_dpn
from .factory import Layers
from .mobilenet import EFFICIENTNET_B0, GatedResidual, make_mobilenet
from .pnasnet import CellA, CellB, make_pnasnet
from .preact import make_preact
from .registry import Architecture, build_from, describe
from .resnet import make_resnet
from .resnext import make_resnext
from .simple import make_lenet, make_mlp, make_regression, make_simple_cnn
from .vgg import make_vgg


def _vgg(depth: int) -> Architecture:
    description = f"VGG-{depth}: {depth - 3} convolutions, global average, one linear layer"
    return Architecture(partial(make_vgg, depth=depth), description, ("dropout_rate",))


def _resnet(depth: int, description: str) -> Architecture:
    return Architecture(partial(make_resnet, depth=depth), f"ResNet-{depth}: {description}")


_RESNET18 = _resnet(18, "eight residual blocks of two 3 x 3 convolutions")

ARCHITECTURES: dict[str, Architecture] = {
    "vgg11": _vgg(11),
    "vgg13": _vgg(13),
    "vgg16": _vgg(16),
    "vgg19": _vgg(19),
    "resnet": replace(_RESNET18, description="the same as resnet18"),
    "resnet18": _RESNET18,
    "resnet34": _resnet(34, "sixteen residual blocks of two 3 x 3 convolutions"),
    "resnet50": _resnet(50, "sixteen residual blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions"),
    "densenet121": Architecture(
        make_densenet, "DenseNet-121: four dense blocks, each layer adds 32 channels"
    ),
    "preact": Architecture(
        make_preact, "Preact-ResNet-18: eight blocks of two 3 x 3 convolutions, norm and ReLU first"
    ),
    "senet": Architecture(
        partial(make_preact, stem=small_stem, gate=SqueezeExcitation),
        "SENet-18: Preact-ResNet-18 with squeeze and excitation in each block",
    ),
    "resnext": Architecture(
        make_resnext, "ResNeXt-29 32x4d: nine bottlenecks, 3 x 3 convolutions in 32 groups"
    ),
    "mobilev2": Architecture(
        make_mobilenet, "MobileNet v2: seventeen inverted residuals, depthwise"
    ),
    "efficient": Architecture(
        partial(make_mobilenet, block=GatedResidual, stages=EFFICIENTNET_B0, head=0),
        "EfficientNet-B0: sixteen inverted residuals with squeeze and excitation",
    ),
    "dpn": Architecture(
        make_dpn, "DPN-92: thirty dual path blocks, 3 x 3 convolutions in 32 groups"
    ),
    "pnasnetA": Architecture(
        partial(make_pnasnet, cell=CellA, width=44),
        "PNASNet-A: twenty cells of a 7 x 7 depthwise convolution and a max-pool",
    ),
    "pnasnetB": Architecture(
        partial(make_pnasnet, cell=CellB, width=32),
        "PNASNet-B: twenty cells of three depthwise convolutions, a max-pool and a 1 x 1",
    ),
    "airbench": Architecture(
        make_airbench,
        "airbench: frozen whitening of 2 x 2 patches, six convolutions, GELU",
        init=init_airbench,
    ),
    "lenet": Architecture(make_lenet, "LeNet-5: two 5 x 5 convolutions and three linear layers"),
    "simple_v1": Architecture(
        make_regression,
        "linear or logistic regression: one layer on the whole image (method 1 to 4)",
        ("image_size", "method"),
        min_image_size=1,
    ),
    "simple_v2": Architecture(
        make_simple_cnn, "three convolutions and a linear layer", ("dropout_rate",)
    ),
    "mlp": Architecture(
        make_mlp,
        "two hidden layers of 128 features and a linear layer (method 1 to 4)",
        ("image_size", "method", "dropout_rate"),
        min_image_size=1,
    ),
}


def build_model(
    arch: str,
    layers: Layers,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int = 32,
    method: int | None = None,
    dropout_rate: float = 0.0,
) -> nn.Module:
    """Build and initialise a network that maps (N, in_channels, H, W) to (N, num_classes).

    Args:
        arch: a name of `ARCHITECTURES`.
        layers: from `make_layers`.
        in_channels: channels of the images.
        num_classes: classes of the output.
        image_size: side of the images, in pixels. simple_v1 and mlp take exactly this size,
            convolutional networks any size from 32.
        method: variant of simple_v1 and mlp, 1 to 4; None: plain layers, or joint deconvolution
            with deconvolution layers.
        dropout_rate: probability of dropping a feature before a linear layer, for networks that
            have dropout.

    Raises:
        ValueError: `arch` is unknown, does not take an option, or needs larger images.

    Example:
        >>> model = build_model("vgg11", make_layers(deconv=True))
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return build_from(
        ARCHITECTURES,
        arch,
        layers,
        image_size=image_size,
        optional={"method": (method, None), "dropout_rate": (dropout_rate, 0.0)},
        in_channels=in_channels,
        num_classes=num_classes,
    )


def describe_architectures() -> str:
    """Format the table as the text that `--arch help` prints."""
    return describe(ARCHITECTURES)
