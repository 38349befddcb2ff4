"""The networks for pictures of ImageNet's size: ours, of either kind of layers, and torchvision's.

Ours end in `d`. With BatchNorm they are the networks that torchvision calls by the same name
without the `d` (vgg11d: vgg11_bn, its convolutions without the bias that BatchNorm takes back).
With deconvolution no BatchNorm is left, shortcuts included.
"""

from __future__ import annotations

import textwrap
from functools import partial

from torch import nn
from torchvision import models as torchvision_models
from torchvision.models import get_model, list_models

from .architecture import MIN_IMAGE_SIZE, Architecture, build_from, describe
from .densenet import DenseNet
from .factory import Layers
from .resnet import ResNet
from .stem import large_stem
from .vgg import VGG

PRETRAINED_CLASSES = 1000
AUXILIARY = ("googlenet", "inception_v3")  # more than one output in training, unless told
# Below these sides some layer has nothing left to look at; every other network takes 32.
TORCHVISION_MIN_SIZES = {"alexnet": 63, "inception_v3": 75}


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


def _build_torchvision(
    layers: Layers,
    *,
    name: str,
    num_classes: int,
    image_size: int | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """Torchvision's network of that name, without auxiliary heads; `image_size` if made for one."""
    if not layers.ordinary:
        ours = f"{name.removesuffix('_bn')}d"
        able = ours if ours in _OURS else f"one of {', '.join(_OURS)}"
        raise ValueError(f"{name} is torchvision's and keeps its own layers; others need {able}")
    if pretrained and num_classes != PRETRAINED_CLASSES:
        raise ValueError(
            f"pretrained weights know {PRETRAINED_CLASSES} classes, got num_classes={num_classes}"
        )
    options: dict[str, object] = {"num_classes": num_classes}
    if name in AUXILIARY and not pretrained:
        options["init_weights"] = True  # the present default, which warns unless asked for
    if image_size is not None:
        square = {"input_size": (image_size, image_size)}
        options |= square if name.startswith("maxvit") else {"image_size": image_size}
    try:
        model = get_model(name, weights="DEFAULT" if pretrained else None, **options)
    except (AssertionError, ValueError) as error:
        if image_size is None:
            raise
        reason = str(error).splitlines()[0]  # patches or windows do not tile it; other weights
        raise ValueError(f"{name} cannot take image_size={image_size}: {reason}") from error
    if name in AUXILIARY:
        _drop_auxiliary_heads(model)
    return model


def _drop_auxiliary_heads(model: nn.Module) -> None:
    """Make training give one output, as evaluation does."""
    model.aux_logits = False
    for head in ("aux1", "aux2", "AuxLogits"):
        if hasattr(model, head):
            setattr(model, head, None)


def _torchvision(name: str) -> Architecture:
    sized = ("image_size",) if name.startswith(("vit", "maxvit")) else ()
    return Architecture(
        partial(_build_torchvision, name=name),
        f"torchvision's {name}",
        ("pretrained", *sized),
        TORCHVISION_MIN_SIZES.get(name, MIN_IMAGE_SIZE),
        init=None,
    )


# The names that torchvision.models has itself are those of classification.
_THEIRS = {name: _torchvision(name) for name in list_models(module=torchvision_models)}

IMAGENET_ARCHITECTURES: dict[str, Architecture] = _OURS | _THEIRS


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
        arch: a name of `IMAGENET_ARCHITECTURES`.
        layers: from `make_layers`. Torchvision's networks have layers of their own, and so accept
            none but the ordinary ones.
        image_size: side of the pictures, in pixels. The vit and maxvit networks take exactly this
            one, all others any from their `min_image_size` upward.
        pretrained: start from torchvision's weights (downloaded once), torchvision's networks and
            1000 classes only.
        dropout_rate: probability of dropping a feature between linear layers, vgg11d and vgg16d
            only; None: 0.5.

    Raises:
        ValueError: an unknown `arch`, layers or an option it does not take, pictures of a size it
            does not take, or pretrained weights for another number of classes.
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
    return f"{describe(_OURS)}\n\ntorchvision's, with the layers they have there:\n{names}"
