"""The networks: the table of architectures, and `build_model`, which makes one of them.

    layers = make_layers(deconv=True)
    model = build_model("vgg11", layers, num_classes=100)

Every architecture has one definition, made of the layers it is given (see `factory.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from .densenet import DenseNet
from .factory import Layers, make_layers
from .resnet import BasicBlock, Bottleneck, ResNet
from .simple import SimpleCNN, mlp, simple_v1
from .vgg import VGG

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Layers",
    "build_model",
    "describe_architectures",
    "init_weights",
    "make_layers",
]

MIN_IMAGE_SIZE = 32  # pixels; five halvings leave one


@dataclass(frozen=True)
class Architecture:
    """An entry of the table: build(layers, in_channels=, num_classes=, **options) -> network.

    Args:
        build: the maker.
        gloss: one line for the help text.
        options: which of `build_model`'s further arguments it takes.
    """

    build: Callable[..., nn.Module]
    gloss: str
    options: tuple[str, ...] = ()


_RESNET18 = Architecture(
    partial(ResNet, block=BasicBlock, depths=(2, 2, 2, 2)),
    "ResNet-18: eight residual blocks of two 3 x 3 convolutions",
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
        partial(ResNet, block=BasicBlock, depths=(3, 4, 6, 3)),
        "ResNet-34: sixteen residual blocks of two 3 x 3 convolutions",
    ),
    "resnet50": Architecture(
        partial(ResNet, block=Bottleneck, depths=(3, 4, 6, 3)),
        "ResNet-50: sixteen residual blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions",
    ),
    "densenet121": Architecture(
        partial(DenseNet, depths=(6, 12, 24, 16)),
        "DenseNet-121: four dense blocks, 32 channels grown by each layer",
    ),
    "simple_v1": Architecture(
        simple_v1,
        "linear or logistic regression: one layer on the whole picture (method 1 to 4)",
        ("image_size", "method"),
    ),
    "simple_v2": Architecture(
        SimpleCNN, "three convolutions and a linear layer", ("dropout_rate",)
    ),
    "mlp": Architecture(
        mlp,
        "two hidden layers of 128 features and a linear layer (method 1 to 4)",
        ("image_size", "method", "dropout_rate"),
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
        image_size: side of the pictures, in pixels. Convolutional networks accept any size from 32
            upward, whatever this says; simple_v1 and mlp exactly this one.
        method: 1 to 4, simple_v1 and mlp only; None: plain, or joint deconvolution if `layers` is.
        dropout_rate: probability of dropping a feature before a linear layer, where the network has
            dropout.

    Raises:
        ValueError: an unknown `arch`, an option it does not take, or pictures too small for it.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}; got {arch!r}")
    architecture = ARCHITECTURES[arch]
    if "image_size" not in architecture.options and image_size < MIN_IMAGE_SIZE:
        raise ValueError(
            f"image_size must be at least {MIN_IMAGE_SIZE} for {arch}, got {image_size}"
        )
    given = {"image_size": image_size, "method": method, "dropout_rate": dropout_rate}
    for name, absent in (("method", None), ("dropout_rate", 0.0)):
        if name not in architecture.options and given[name] != absent:
            takers = ", ".join(key for key, a in ARCHITECTURES.items() if name in a.options)
            raise ValueError(f"{name}={given[name]} does not apply to {arch}, only to {takers}")
    options = {name: given[name] for name in architecture.options}
    model = architecture.build(layers, in_channels=in_channels, num_classes=num_classes, **options)
    init_weights(model)
    return model


def describe_architectures() -> str:
    """The table as text, one line an architecture: what `--arch help` prints."""
    width = max(map(len, ARCHITECTURES))
    return "\n".join(f"  {name:{width}}  {a.gloss}" for name, a in ARCHITECTURES.items())


def init_weights(model: nn.Module) -> None:
    """Draw every weight anew: the only initialisation there is, the same for both kinds of network.

    Weights and biases of convolutions and linear layers are uniform in +-1/sqrt(fan_in), BatchNorm
    starts as the identity. That is PyTorch's own default, written out so that it stays.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = module.weight[0].numel() ** -0.5
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
