"""Settings of a run: typed flags, preset, checkpoint and defaults in one namespace."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from util.cli.flag_rules import find_fault
from util.cli.inherited import check_unchanged, inherit_flags, load_saved
from util.cli.script import PRESETS, Script
from util.tracking.run_dir import find_out
from util.training.optim import OPTIMIZER_DEFAULTS


def read_settings(script: Script, argv: Sequence[str]) -> tuple[Namespace, dict[str, Any] | None]:
    """Return all flags, checked, and the checkpoint of --resume.

    Typed flags override the preset, which overrides the checkpoint, which overrides the defaults.
    No flag is ignored: one that would have no effect or contradicts another is refused. `argv` has
    no name of a script.

    Raises:
        SystemExit: code 2, with one line that names the flag, its value and the remedy.
        CheckpointError: the checkpoint cannot be read, or was trained with other flags.
    """
    parser = script.parser
    preset_name = parser.parse_typed(argv).get("preset")
    preset = parser.parse_typed(PRESETS[preset_name].split()) if preset_name else {}
    typed = parser.parse_typed(argv)  # last, so that errors spell the flags as they were typed
    saved = load_saved(script, typed)
    inherited = inherit_flags(saved, typed, parser) if saved else {}
    chosen = {**inherited, **preset, **typed}
    defaults = parser.defaults()
    defaults |= OPTIMIZER_DEFAULTS.get(chosen.get("optimizer", defaults["optimizer"]), {})
    flags = Namespace(**{**defaults, **chosen})
    resolve_flags(flags, typed, script)
    if fault := find_fault(flags, typed, script):
        name, reason = fault
        value = getattr(flags, name)
        words = [f"{v:g}" for v in value] if isinstance(value, list) else [str(value)]
        words = [] if value is True else words  # a flag without a value means True
        parser.error(" ".join([parser.spelling[name], *words, reason]))
    if saved:
        check_unchanged(flags, typed, saved["config"], parser)
    return flags, saved


def resolve_flags(flags: Namespace, typed: Collection[str], script: Script) -> None:
    """Set the flags whose defaults depend on other flags, in place."""
    has_method = "method" in script.architectures[flags.arch].options
    if has_method:
        flags.method = flags.method or (3 if flags.deconv else 1)
        flags.deconv = flags.deconv if "deconv" in typed else flags.method != 1
    elif flags.num_groups_final is None:
        flags.num_groups_final = script.final_block if flags.deconv else 0
    if flags.batchnorm is None:
        flags.batchnorm = not flags.deconv and flags.arch != "simple_v1"
    if flags.bias is None:
        flags.bias = has_method or not flags.batchnorm
    if flags.out is None:
        run_dir = flags.run_dir or (flags.resume and Path(flags.resume).resolve().parent)
        flags.out = str(find_out(Path(run_dir))) if run_dir else "./runs"


def choose_layers(flags: Namespace) -> dict[str, Any]:
    """Return the flags about layers as the keyword arguments of `models.make_layers`."""
    unchanged = (
        *("deconv", "mode", "eps", "stem_iter", "bias", "batchnorm"),
        *(
            "sync_stats",
            "layout",
            "root",
            "root_final",
            "rows_per_feature",
            "freeze",
            "freeze_iter",
        ),
    )
    return {name: getattr(flags, name) for name in unchanged} | {
        "block": flags.num_groups,
        "block_final": flags.num_groups_final,
        "n_iter": flags.deconv_iter,
        "sampling_stride": flags.stride,
        "shared": flags.share_blocks,
        "input_norm": {"layernorm": "layer", "l1norm": "l1"}.get(flags.norm_type, "none"),
    }
