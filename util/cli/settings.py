"""From what was typed to the settings of a run.

No flag is parsed and ignored: one that would do nothing or contradicts another is refused by name.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from util.checkpoint.store import check_compatible
from util.cli.flag_rules import describe_value, find_fault
from util.cli.inherited import (
    MAY_CHANGE,
    OF_NETWORK,
    OF_THIS_MACHINE,
    _spell,
    load_saved,
    refuse_other_data,
)
from util.cli.script import PRESETS, Script


def read_settings(
    script: Script, argv: Sequence[str] | None = None
) -> tuple[Namespace, dict[str, Any] | None]:
    """All flags, checked, and with --resume the checkpoint; touches neither data nor folders.

    What is typed comes before the preset, that before the checkpoint's own flags, those before the
    defaults.

    Raises:
        SystemExit: code 2, with one line about the flag that is at fault.
        CheckpointError: the checkpoint cannot be read, or was trained with other flags.
    """
    parser = script.parser
    typed = parser.parse_typed(argv)
    saved = load_saved(script, typed)
    defaults = parser.defaults()
    config = {
        name: defaults.get(name) if value is None else value
        for name, value in (saved["config"] if saved else {}).items()
    }
    inherited = {name: config[name] for name in (defaults.keys() & config.keys()) - OF_THIS_MACHINE}
    if typed.get("evaluate"):
        inherited = {name: inherited[name] for name in OF_NETWORK & inherited.keys()}
    if "epochs" in typed:  # else a --max-steps of before would still end the run
        inherited.pop("max_steps", None)
    preset = PRESETS[typed["preset"]] if "preset" in typed else {}
    flags = Namespace(**{**defaults, **inherited, **preset, **typed})
    resolve_flags(flags, typed, script)
    if fault := find_fault(flags, typed, script):
        name, text = fault
        parser.error(f"{parser.spelling[name]} {describe_value(getattr(flags, name))} {text}")
    if saved:
        refuse_other_data(flags, typed, config, parser)
        # A flag that is younger than the checkpoint has nothing to be compared with.
        current = {name: value for name, value in vars(flags).items() if name in config}
        only = OF_NETWORK if typed.get("evaluate") else parser.spelling.keys() - MAY_CHANGE
        check_compatible(_spell(parser, config, only), _spell(parser, current, only))
    return flags, saved


def resolve_flags(flags: Namespace, typed: Collection[str], script: Script) -> None:
    """Set the flags whose defaults follow from others, in place. `typed` names the typed ones."""
    by_method = "method" in script.architectures[flags.arch]
    if by_method:
        flags.method = flags.method or (3 if flags.deconv else 1)
        flags.deconv = flags.deconv if "deconv" in typed else flags.method != 1
    elif flags.num_groups_final is None:
        flags.num_groups_final = script.final_block if flags.deconv else 0
    if flags.batchnorm is None:
        flags.batchnorm = not flags.deconv and flags.arch != "simple_v1"
    if flags.bias is None:
        flags.bias = by_method or not flags.batchnorm
    if flags.out is None:
        run_dir = flags.run_dir or (flags.resume and Path(flags.resume).resolve().parent)
        flags.out = str(Path(run_dir).parent) if run_dir else "./runs"


def choose_layers(flags: Namespace) -> dict[str, Any]:
    """The flags about layers, by the names that the makers of layers give them."""
    return {
        "deconv": flags.deconv,
        "mode": flags.mode,
        "block": flags.num_groups,
        "block_final": flags.num_groups_final,
        "eps": flags.eps,
        "n_iter": flags.deconv_iter,
        "stem_iter": flags.stem_iter,
        "bias": flags.bias,
        "sampling_stride": flags.stride,
        "batchnorm": flags.batchnorm,
        "sync_stats": flags.sync_stats,
        "layout": flags.layout,
        "shared": flags.share_blocks,
        "root": flags.root,
        "rows_per_feature": flags.rows_per_feature,
    }
