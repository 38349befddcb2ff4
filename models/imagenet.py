"""The networks for images of ImageNet's size: ours, torchvision's and timm's, of either kind.

Ours end in `d`. With BatchNorm they are the networks that torchvision calls by the same name
without the `d` (vgg11d: vgg11_bn, its convolutions without the bias that BatchNorm takes back).
With deconvolution no BatchNorm is left, shortcuts included. Those of others are converted to it.
"""

from __future__ import annotations

import textwrap
from functools import partial

from torch import nn

from .building_blocks import large_stem
from .densenet import DenseNet
from .external import PRETRAINED_CLASSES, TIMM, list_torchvision, timm_architecture
from .factory import Layers
from .registry import Architecture, build_from, describe
from .resnet import ResNet
from .vgg import VGG


def _resnet(depth: int, gloss: str) -> Architecture:
    return Architecture(partial(ResNet, depth=depth, stem=large_stem), f"ResNet-{depth}: {gloss}")


def _vgg(depth: int) -> Architecture:
    build = partial(VGG, depth=depth, side=7, hidden=(4096, 4096), dropout_rate=0.5)
    gloss = f"VGG-{depth}: {depth - 3} convolutions and three linear layers"
    return Architecture(build, gloss, ("dropout_rate",))


_OURS: dict[str, Architecture] = {
    "resnet18d": _resnet(18, "eight residual blocks of two 3 x 3 convolutions"),
    "resnet34d": _resnet(34, "sixteen residual blocks of two 3 x 3 convolutions"),
    "resnet50d": _resnet(50, "sixteen residual blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions"),
    "resnet101d": _resnet(
        101, "thirty-three residual blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions"
    ),
    "vgg11d": _vgg(11),
    "vgg16d": _vgg(16),
    "densenet121d": Architecture(
        partial(DenseNet, depth=121, stem=large_stem),
        "DenseNet-121: four dense blocks, 32 channels grown by each layer",
    ),
}


_THEIRS = list_torchvision()


class _WithTimm(dict[str, Architecture]):
    """A table that has, besides what it lists, every `timm/NAME`: whether it exists shows later."""

    def __contains__(self, arch: object) -> bool:
        return super().__contains__(arch) or str(arch).startswith(TIMM)

    def __missing__(self, arch: str) -> Architecture:
        if arch not in self:
            raise KeyError(arch)
        return timm_architecture(arch)


IMAGENET_ARCHITECTURES = _WithTimm(_OURS | _THEIRS)


def build_imagenet_model(
    arch: str,
    layers: Layers,
    *,
    num_classes: int = PRETRAINED_CLASSES,
    image_size: int = 224,
    pretrained: bool = False,
    dropout_rate: float | None = None,
) -> nn.Module:
    """A network that maps (N, 3, H, W) to (N, num_classes); freshly initialised unless pretrained.

    Args:
        arch: a name of `IMAGENET_ARCHITECTURES`, or timm/NAME for a network of timm.
        layers: from `make_layers`. The networks of torchvision and timm have layers of their own,
            which stay or are converted: they take the ordinary layers and those of deconvolution.
        image_size: side of the images, in pixels. The vit and maxvit networks take exactly this
            one, all others any from their `min_image_size` upward.
        pretrained: start from the weights of torchvision or timm (downloaded once), their networks
            and 1000 classes only; with deconvolution BatchNorm is folded in.
        dropout_rate: probability of dropping a feature between linear layers, vgg11d and vgg16d
            only; None: 0.5.

    Raises:
        ValueError: an unknown `arch`, timm is not installed, layers or an option it does not take,
            images of a size it does not take, or pretrained weights for another number of
            classes.
        OSError: the weights cannot be downloaded.
    """
    return build_from(
        IMAGENET_ARCHITECTURES,
        arch,
        layers,
        image_size=image_size,
        optional={"pretrained": (pretrained, False), "dropout_rate": (dropout_rate, None)},
        num_classes=num_classes,
    )


def describe_imagenet_architectures() -> str:
    """The table as text: ours one line each, torchvision's by name."""
    names = textwrap.fill(", ".join(_THEIRS), width=98, initial_indent="  ", subsequent_indent="  ")
    theirs = f"torchvision's, converted to deconvolution where that is asked for:\n{names}"
    more = f"{TIMM}NAME: any network of timm, where timm is installed, in the same way"
    return f"{describe(_OURS)}\n\n{theirs}\n\n{more}"
