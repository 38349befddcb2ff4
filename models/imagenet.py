"""Table of networks for images of ImageNet's size: our own, torchvision's and timm's.

Names of our own end in `d`. With BatchNorm they equal torchvision's networks of the same name
without the `d`; vgg11d equals vgg11_bn without the redundant bias of its convolutions. With
deconvolution they have no BatchNorm, in shortcuts neither. Networks of torchvision and timm are
converted; see `external.py`.
"""

from __future__ import annotations

import textwrap
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from .building_blocks import large_stem
from .external import PRETRAINED_CLASSES, TIMM, list_torchvision, make_timm_entry
from .factory import Layers
from .registry import Architecture, build_from, describe
from .resnet import make_resnet
from .small_images import ARCHITECTURES


def _enlarge(arch: str, **options: Any) -> Architecture:
    """Return the entry of a network for small images, with options for large images."""
    entry = ARCHITECTURES[arch]
    return replace(entry, build=partial(entry.build, **options))


def _vgg(depth: int) -> Architecture:
    entry = _enlarge(f"vgg{depth}", side=7, hidden=(4096, 4096), dropout_rate=0.5)
    description = f"VGG-{depth}: {depth - 3} convolutions and three linear layers"
    return replace(entry, description=description)


OURS: dict[str, Architecture] = {
    "resnet18d": _enlarge("resnet18", stem=large_stem),
    "resnet34d": _enlarge("resnet34", stem=large_stem),
    "resnet50d": _enlarge("resnet50", stem=large_stem),
    "resnet101d": Architecture(
        partial(make_resnet, depth=101, stem=large_stem),
        "ResNet-101: thirty-three residual blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions",
    ),
    "vgg11d": _vgg(11),
    "vgg16d": _vgg(16),
    "densenet121d": _enlarge("densenet121", stem=large_stem),
}
_TORCHVISION = list_torchvision()


class _TableWithTimm(dict[str, Architecture]):
    """Table that also has an entry `timm/NAME` for any NAME; building it checks the name."""

    def __contains__(self, arch: object) -> bool:
        return super().__contains__(arch) or str(arch).startswith(TIMM)

    def __missing__(self, arch: str) -> Architecture:
        if arch not in self:
            raise KeyError(arch)
        return make_timm_entry(arch)


IMAGENET_ARCHITECTURES = _TableWithTimm(OURS | _TORCHVISION)


def build_imagenet_model(
    arch: str,
    layers: Layers,
    *,
    num_classes: int = PRETRAINED_CLASSES,
    image_size: int = 224,
    pretrained: bool = False,
    download: bool = True,
    dropout_rate: float | None = None,
) -> nn.Module:
    """Build a network that maps (N, 3, H, W) to (N, num_classes).

    Args:
        arch: a name of `IMAGENET_ARCHITECTURES`, or timm/NAME for a network of timm.
        layers: from `make_layers`. Networks of torchvision and timm take the layers of plain
            BatchNorm or of plain deconvolution only.
        num_classes: classes of the output.
        image_size: side of the images, in pixels. The vit and maxvit networks take exactly this
            size, all others any size from their `min_image_size`.
        pretrained: start from the weights of torchvision or timm, which are downloaded once. Only
            for their networks; deconvolution folds the BatchNorm in. If `num_classes` is not that
            of the weights, the last layer is a new one.
        download: False builds the network of `pretrained` for the weights of a checkpoint.
        dropout_rate: probability of dropping a feature between linear layers, for vgg11d and vgg16d
            only; None: 0.5.

    Raises:
        ValueError: `arch` is unknown, timm is not installed, or the network does not take the
            layers, an option or the image size.
        OSError: the weights cannot be downloaded.

    Example:
        >>> model = build_imagenet_model("resnet18d", make_layers(deconv=True))
        >>> model(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 1000])
    """
    return build_from(
        IMAGENET_ARCHITECTURES,
        arch,
        layers,
        image_size=image_size,
        optional={
            "pretrained": (pretrained, False),
            "download": (download, True),
            "dropout_rate": (dropout_rate, None),
        },
        num_classes=num_classes,
    )


def describe_imagenet_architectures() -> str:
    """Format the table as text: a line for each network of our own, and names of the others."""
    names = textwrap.fill(
        ", ".join(_TORCHVISION), width=98, initial_indent="  ", subsequent_indent="  "
    )
    return (
        f"{describe(OURS)}\n\n"
        f"networks of torchvision, converted with --deconv True:\n{names}\n\n"
        f"{TIMM}NAME: any network of timm, if installed, converted with --deconv True"
    )
