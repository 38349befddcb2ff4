"""TODO: util/cli/script.py."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from util.cli.parser import Parser

# The settings of the paper's tables. Flags typed beside `--preset` win.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "batch_size": 128,
        "weight_decay": 1e-3,
        "num_groups": 64,
        "eps": 1e-5,
        "deconv_iter": 5,
        "stem_iter": 15,
        "root": "resolvent",
        "rows_per_feature": 0,
    }
}

Rules = Iterator[tuple[str, bool, str]]  # flag, is it all right, else what is wrong with it
Architectures = Mapping[str, Collection[str]]  # name -> options it takes: method, dropout_rate, ...


@dataclass(frozen=True)
class Script:
    """What `read_settings` must know about a script.

    Attributes:
        parser: with all its flags.
        architectures: the options that each architecture takes.
        final_block: --num-groups-final with deconvolution.
        rules: its own, on (flags).
    """

    parser: Parser
    architectures: Architectures
    final_block: int = 512
    rules: Callable[[Namespace], Rules] = lambda flags: iter(())
