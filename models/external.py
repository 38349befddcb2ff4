"""Networks of torchvision and timm, built by these libraries and converted to our layers.

They initialise their own weights and cite their own papers.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec

from torch import nn
from torchvision import models as torchvision_models
from torchvision.models import get_model, list_models

from .factory import Layers
from .registry import MIN_IMAGE_SIZE, Architecture
from .transfer import take_weights

PRETRAINED_CLASSES = 1000
TIMM = "timm/"  # prefix of the names of timm's networks
AUXILIARY = ("googlenet", "inception_v3")  # have more than one output in training
# Smallest sides at which every layer has input; all other networks take MIN_IMAGE_SIZE.
TORCHVISION_MIN_SIZES = {"alexnet": 63, "inception_v3": 75}


def list_torchvision() -> dict[str, Architecture]:
    """Return the entries of torchvision's networks for classification."""
    return {name: _make_torchvision_entry(name) for name in list_models(module=torchvision_models)}


def _make_torchvision_entry(name: str) -> Architecture:
    sized = ("image_size",) if name.startswith(("vit", "maxvit")) else ()
    build, options = partial(_build_torchvision, name=name), ("pretrained", "download", *sized)
    min_size = TORCHVISION_MIN_SIZES.get(name, MIN_IMAGE_SIZE)
    return Architecture(build, f"torchvision's {name}", options, min_size, init=None)


def make_timm_entry(arch: str) -> Architecture:
    """Return the entry of timm/NAME."""
    name = arch.removeprefix(TIMM)
    build = partial(_build_timm, name=name)
    return Architecture(
        build, f"timm's {name}", ("pretrained", "download", "image_size"), init=None
    )


def count_pretrained_classes(arch: str) -> int:
    """Return the number of classes of the pretrained weights of torchvision or timm."""
    if not arch.startswith(TIMM):
        return PRETRAINED_CLASSES
    import timm

    return timm.get_pretrained_cfg(arch.removeprefix(TIMM)).num_classes


def _build_torchvision(
    layers: Layers,
    *,
    name: str,
    num_classes: int,
    image_size: int | None = None,
    pretrained: bool = False,
    download: bool = True,
) -> nn.Module:
    """Build a network of torchvision without auxiliary heads.

    Another number of classes than that of the pretrained weights gets a new last layer.
    """
    _check(name, layers)
    options: dict[str, object] = {}
    if image_size is not None:
        square = {"input_size": (image_size, image_size)}
        options |= square if name.startswith("maxvit") else {"image_size": image_size}
    own: dict[str, object] = {"num_classes": num_classes}
    if name in AUXILIARY:  # init_weights=True is the default, which warns unless given
        own |= {"init_weights": True, "transform_input": pretrained}
    try:
        model = get_model(name, weights=None, **own, **options)
        if pretrained and download:
            take_weights(model, get_model(name, weights="DEFAULT", **options).state_dict())
    except (AssertionError, ValueError) as error:
        if image_size is None:
            raise
        reason = str(error).splitlines()[0]  # patches or windows do not tile it; other weights
        raise ValueError(f"{name} cannot take image_size={image_size}: {reason}") from error
    if name in AUXILIARY:
        _drop_auxiliary_heads(model)
    return layers.adapt(model, pretrained=pretrained)


def _build_timm(
    layers: Layers,
    *,
    name: str,
    num_classes: int,
    image_size: int,
    pretrained: bool = False,
    download: bool = True,
) -> nn.Module:
    """Build a network of timm, for `image_size` if it needs to know."""
    _check(f"{TIMM}{name}", layers)
    if find_spec("timm") is None:
        raise ValueError(f"{TIMM}{name} needs timm, which is not installed: pip install timm")
    import timm  # takes seconds, and few runs need it

    if not timm.is_model(name):
        closest = get_close_matches(name, timm.list_models(), n=4, cutoff=0)
        raise ValueError(f"timm has no {name!r}; the closest names are {', '.join(closest)}")
    config = timm.get_pretrained_cfg(name)
    sized = config is not None and config.fixed_input_size
    options = {"img_size": image_size} if sized else {}
    try:
        model = timm.create_model(name, pretrained and download, num_classes=num_classes, **options)
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]  # the size does not fit, or there are no weights
        raise ValueError(f"timm cannot build {name}: {reason}") from error
    return layers.adapt(model, pretrained=pretrained)


def _check(name: str, layers: Layers) -> None:
    """Raise ValueError if the network cannot have these layers."""
    if layers.adapt is None:
        raise ValueError(
            f"{name} has layers of its own: BatchNorm can neither be omitted nor be combined with "
            "a deconvolution in the last layer"
        )


def _drop_auxiliary_heads(model: nn.Module) -> None:
    """Reduce the outputs in training to the one of evaluation."""
    model.aux_logits = False
    for head in ("aux1", "aux2", "AuxLogits"):
        if hasattr(model, head):
            setattr(model, head, None)
