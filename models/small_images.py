"""TODO: models/small_images.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from .building_blocks import SqueezeExcitation, small_stem
from .densenet import DenseNet
from .dpn import DPN
from .factory import Layers
from .mobilenet import EFFICIENTNET_B0, GatedResidual, MobileNet
from .pnasnet import CellA, CellB, PNASNet
from .preact import PreActResNet
from .registry import Architecture, build_from, describe
from .resnet import ResNet
from .resnext import ResNeXt
from .simple import LeNet, SimpleCNN, mlp, simple_v1
from .vgg import VGG

_RESNET18 = Architecture(
    partial(ResNet, depth=18), "ResNet-18: eight residual blocks of two 3 x 3 convolutions"
)

ARCHITECTURES: dict[str, Architecture] = {
    **{
        f"vgg{depth}": Architecture(
            partial(VGG, depth=depth),
            f"VGG-{depth}: {depth - 3} convolutions, global average, one linear layer",
            ("dropout_rate",),
        )
        for depth in (11, 13, 16, 19)
    },
    "resnet": replace(_RESNET18, gloss="the same as resnet18"),
    "resnet18": _RESNET18,
    "resnet34": Architecture(
        partial(ResNet, depth=34), "ResNet-34: sixteen residual blocks of two 3 x 3 convolutions"
    ),
    "resnet50": Architecture(
        partial(ResNet, depth=50),
        "ResNet-50: sixteen residual blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions",
    ),
    "densenet121": Architecture(
        partial(DenseNet, depth=121),
        "DenseNet-121: four dense blocks, 32 channels grown by each layer",
    ),
    "preact": Architecture(
        PreActResNet,
        "Preact-ResNet-18: eight blocks of two 3 x 3 convolutions, norm and ReLU first",
    ),
    "senet": Architecture(
        partial(PreActResNet, stem=small_stem, gate=SqueezeExcitation),
        "SENet-18: the same with squeeze and excitation of each block",
    ),
    "resnext": Architecture(
        ResNeXt, "ResNeXt-29 32x4d: nine bottlenecks, 3 x 3 convolutions in 32 groups"
    ),
    "mobilev2": Architecture(MobileNet, "MobileNet v2: seventeen inverted residuals, depthwise"),
    "efficient": Architecture(
        partial(MobileNet, block=GatedResidual, stages=EFFICIENTNET_B0, head=0),
        "EfficientNet-B0: sixteen inverted residuals with squeeze and excitation",
    ),
    "dpn": Architecture(DPN, "DPN-92: thirty dual path blocks, 3 x 3 convolutions in 32 groups"),
    "pnasnetA": Architecture(
        partial(PNASNet, cell=CellA, width=44),
        "PNASNet-A: twenty cells of a 7 x 7 depthwise convolution and a max-pool",
    ),
    "pnasnetB": Architecture(
        partial(PNASNet, cell=CellB, width=32),
        "PNASNet-B: twenty cells of three depthwise convolutions, a max-pool and a 1 x 1",
    ),
    "lenet": Architecture(LeNet, "LeNet-5: two 5 x 5 convolutions and three linear layers"),
    "simple_v1": Architecture(
        simple_v1,
        "linear or logistic regression: one layer on the whole image (method 1 to 4)",
        ("image_size", "method"),
        min_image_size=1,
    ),
    "simple_v2": Architecture(
        SimpleCNN, "three convolutions and a linear layer", ("dropout_rate",)
    ),
    "mlp": Architecture(
        mlp,
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
    """A freshly initialised network that maps (N, in_channels, H, W) to (N, num_classes).

    Args:
        arch: a name of `ARCHITECTURES`.
        layers: from `make_layers`.
        image_size: side of the images, in pixels. Convolutional networks accept any size from 32
            upward, whatever this says; simple_v1 and mlp exactly this one.
        method: 1 to 4, simple_v1 and mlp only; None: plain, or joint deconvolution if `layers` is.
        dropout_rate: probability of dropping a feature before a linear layer, where the network has
            dropout.

    Raises:
        ValueError: an unknown `arch`, an option it does not take, or images too small for it.
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
    """The table as text, one line an architecture: what `--arch help` prints."""
    return describe(ARCHITECTURES)
