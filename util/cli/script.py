"""Declaration of a script's command line, and the presets."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from util.cli.parser import Parser

# Flags typed along with `--preset` override the preset.
PRESETS = {
    "paper": "--batch-size 128 --wd 1e-3 --num-groups 64 --eps 1e-5 --deconv-iter 5 --stem-iter 15 "
    "--root resolvent --rows-per-feature 0"
}

Rules = Iterator[tuple[str, bool, str]]  # (flag, whether its value is allowed, error if it is not)


class Network(Protocol):
    """Entry of a table of networks."""

    options: Collection[str]  # "method", "dropout_rate", ...


@dataclass(frozen=True)
class Script:
    """Command line of a script, as `read_settings` needs it.

    Attributes:
        parser: parser with all flags of the script.
        architectures: table of the networks.
        final_block: default of --num-groups-final with --deconv, in features.
        rules: rules of this script alone, a function of the flags.
    """

    parser: Parser
    architectures: Mapping[str, Network]
    final_block: int = 512
    rules: Callable[[Namespace], Rules] = lambda flags: iter(())
