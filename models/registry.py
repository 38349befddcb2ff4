"""Registry of networks: its entries, the construction of a model from one, and its help text.

CONTRIBUTING.md lists the places of a new network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from torch import Tensor, nn

from .factory import Layers

# Pixels; five halvings leave one. util/data/loader.py has the same number, because models and util
# do not import each other.
MIN_IMAGE_SIZE = 32
MAX_NAMES = 24  # in an error message

# load(number) -> that many training images (N, C, H, W), or all if there are fewer.
LoadImages = Callable[[int], Tensor]


def init_weights(model: nn.Module) -> None:
    """Initialise all weights of a model, in the same way for both kinds of layers.

    Weights and biases of convolutions and linear layers are uniform in +-1/sqrt(fan_in); BatchNorm
    starts as the identity. These are the defaults of PyTorch, fixed here against changes.
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


def init_from_images(model: nn.Module, load: LoadImages) -> None:
    """Initialise the layers whose weights depend on training images; most models have none.

    Args:
        model: a new model, on the CPU. A resumed one has these weights from its checkpoint.
        load: called once for each such layer.
    """
    for module in model.modules():
        if hasattr(module, "init_from_images"):
            module.init_from_images(load)


@dataclass(frozen=True)
class Architecture:
    """Entry of a table of networks.

    Args:
        build: build(layers, num_classes=, **options) -> model.
        description: one line for the help text.
        options: names of the optional arguments of `build_model` or `build_imagenet_model` that
            the network takes.
        min_image_size: side of the smallest images that the network takes, in pixels.
        init: initialises the weights; None if `build` does.
    """

    build: Callable[..., nn.Module]
    description: str
    options: tuple[str, ...] = ()
    min_image_size: int = MIN_IMAGE_SIZE
    init: Callable[[nn.Module], None] | None = init_weights


Table = Mapping[str, Architecture]


def build_from(
    table: Table,
    arch: str,
    layers: Layers,
    *,
    image_size: int,
    optional: Mapping[str, tuple[object, object]],
    **shape: int,
) -> nn.Module:
    """Build and initialise a network of a table.

    All networks take `shape`, those that need it `image_size`. `optional` has the value and the
    default of each option that only some networks take.

    Raises:
        ValueError: `arch` is unknown, does not take an option, or needs larger images.
    """
    if arch not in table:
        raise ValueError(f"arch must be one of {_list_names(table, arch)}; got {arch!r}")
    architecture = table[arch]
    if image_size < (minimum := architecture.min_image_size):
        raise ValueError(f"image_size must be at least {minimum} for {arch}, got {image_size}")
    options: dict[str, object] = {}
    if "image_size" in architecture.options:
        options["image_size"] = image_size
    for name, (value, default) in optional.items():
        if value == default:
            continue
        if name not in architecture.options:
            takers = [key for key, entry in table.items() if name in entry.options]
            raise ValueError(
                f"{name}={value} does not apply to {arch}, only to {_list_names(takers, arch)}"
            )
        options[name] = value
    model = architecture.build(layers, **shape, **options)
    if architecture.init is not None:
        architecture.init(model)
    return model


def describe(table: Table) -> str:
    """Format a table as text, one network a line."""
    width = max(map(len, table))
    return "\n".join(f"  {name:{width}}  {entry.description}" for name, entry in table.items())


def _list_names(names: Collection[str], arch: str) -> str:
    """Join the names; of more than `MAX_NAMES` only those closest to `arch`."""
    if len(names) <= MAX_NAMES:
        return ", ".join(names)
    closest = get_close_matches(arch, names, n=4, cutoff=0)
    return f"{', '.join(closest)} and {len(names) - len(closest)} more"
