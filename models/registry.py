"""What an entry of the tables of networks is, and how a network is made from one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from .factory import Layers

MIN_IMAGE_SIZE = 32  # pixels; five halvings leave one
NAMES_SHOWN = 24  # in an error


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


@dataclass(frozen=True)
class Architecture:
    """An entry of a table: build(layers, num_classes=, **options) -> network.

    Args:
        build: the maker.
        gloss: one line for the help text.
        options: which of the further arguments of `build_model` or `build_imagenet_model` it takes.
        min_image_size: side of the smallest images that it takes, in pixels.
        init: draws the weights of the new network; None where `build` has done so.
    """

    build: Callable[..., nn.Module]
    gloss: str
    options: tuple[str, ...] = ()
    min_image_size: int = MIN_IMAGE_SIZE
    init: Callable[[nn.Module], None] | None = init_weights


Table = Mapping[str, Architecture]


class Options(Mapping[str, Collection[str]]):
    """The options of the architectures of a table, by name; also of those it does not list."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __getitem__(self, arch: str) -> Collection[str]:
        return self._table[arch].options

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


def build_from(
    table: Table,
    arch: str,
    layers: Layers,
    *,
    image_size: int,
    optional: Mapping[str, tuple[object, object]],
    **shape: int,
) -> nn.Module:
    """A freshly initialised network of a table.

    Args:
        image_size: side of the images, in pixels; handed on to networks made for one size.
        optional: name -> (value, the value that asks for nothing) of what some networks take.
        shape: of every network's input and output.

    Raises:
        ValueError: an unknown `arch`, an option it does not take, or images too small for it.
    """
    if arch not in table:
        raise ValueError(f"arch must be one of {_name_some(table, arch)}; got {arch!r}")
    architecture = table[arch]
    if image_size < (least := architecture.min_image_size):
        raise ValueError(f"image_size must be at least {least} for {arch}, got {image_size}")
    given = {"image_size": image_size}
    for name, (value, idle) in optional.items():
        if value == idle:
            continue
        if name not in architecture.options:
            takers = _name_some([key for key, a in table.items() if name in a.options], arch)
            raise ValueError(f"{name}={value} does not apply to {arch}, only to {takers}")
        given[name] = value
    options = {name: given[name] for name in architecture.options if name in given}
    model = architecture.build(layers, **shape, **options)
    if architecture.init:
        architecture.init(model)
    return model


def describe(table: Table) -> str:
    """A table as text, one line an architecture."""
    width = max(map(len, table))
    return "\n".join(f"  {name:{width}}  {a.gloss}" for name, a in table.items())


def _name_some(names: Collection[str], near: str) -> str:
    """All names where they are few, else those most like `near`."""
    if len(names) <= NAMES_SHOWN:
        return ", ".join(names)
    shown = get_close_matches(near, names, n=4, cutoff=0)
    return f"{', '.join(shown)} and {len(names) - len(shown)} more"
