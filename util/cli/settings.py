"""Settings of a run: typed flags, file, preset, checkpoint and defaults in one namespace."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from util.cli.config import read_config
from util.cli.flag_rules import find_fault
from util.cli.inherited import check_unchanged, inherit_flags, load_saved
from util.cli.parser import Parser
from util.cli.script import PRESETS, Script
from util.console import print_line
from util.tracking.run_dir import find_out
from util.training.optim import OPTIMIZER_DEFAULTS

# Flags whose defaults follow from other flags.
DERIVED = ("method", "num_groups_final", "batchnorm", "bias", "lr", "weight_decay")


def read_settings(script: Script, argv: Sequence[str]) -> tuple[Namespace, dict[str, Any] | None]:
    """Return all flags, checked, and the checkpoint of --resume.

    Typed flags override a YAML file of --config, which overrides the preset, then the args.json of
    --config, the checkpoint and the defaults. No typed flag is ignored: one that would have no
    effect or contradicts another is refused. `argv` has no name of a script.

    Raises:
        SystemExit: code 2, with one line that names the flag, its value and the remedy.
        CheckpointError: the checkpoint cannot be read, or was trained with other flags.
    """
    parser = script.parser
    line = parser.parse_typed(argv)
    chosen, recorded = read_config(line["config"], parser) if "config" in line else ({}, {})
    preset_name = (chosen | line).get("preset")
    preset = parser.parse_typed(PRESETS[preset_name].split()) if preset_name else {}
    typed = chosen | parser.parse_typed(argv)  # last, so that errors spell the flags as typed
    saved = load_saved(script, typed)
    inherited = inherit_flags(saved, typed, parser) if saved else {}
    if recorded:
        if "epochs" in typed:  # as with --resume
            recorded.pop("max_steps", None)
        inherited |= fit_recorded(drop_derived(recorded, script), inherited, preset | typed, script)
    flags = fill_defaults({**inherited, **preset, **typed}, parser)
    resolve_flags(flags, typed, script)
    if fault := find_fault(flags, typed, script):
        name, reason = fault
        parser.source = "" if name in line else f"--config {line['config']}: "
        parser.error(f"{spell(name, getattr(flags, name), parser)} {reason}")
    if saved:
        check_unchanged(flags, typed, saved["config"], parser)
    return flags, saved


def drop_derived(recorded: dict[str, Any], script: Script) -> dict[str, Any]:
    """Leave out recorded flags that follow from others, so that they follow typed ones."""
    others = {name: value for name, value in recorded.items() if name not in DERIVED}
    flags = fill_defaults(others, script.parser)
    resolve_flags(flags, others, script)
    derived = {name for name in DERIVED if getattr(flags, name, None) == recorded.get(name)}
    return {name: value for name, value in recorded.items() if name not in derived}


def fit_recorded(
    recorded: dict[str, Any], inherited: dict[str, Any], typed: dict[str, Any], script: Script
) -> dict[str, Any]:
    """Leave out recorded flags that break a rule beside typed ones, and print them."""
    kept, left_out, defaults = dict(recorded), [], script.parser.defaults()
    while True:
        flags = fill_defaults({**inherited, **kept, **typed}, script.parser)
        resolve_flags(flags, typed, script)
        names = {name for name in kept.keys() - typed.keys() if kept[name] != defaults[name]}
        fault = find_fault(flags, names, script)
        if fault is None:
            break
        name, reason = fault
        left_out.append(f"{spell(name, kept.pop(name), script.parser)} {reason}")
    if left_out:
        print_line(f"--config: left out of the recorded flags: {'; '.join(left_out)}")
    return kept


def spell(name: str, value: Any, parser: Parser) -> str:
    """Return a flag and its value as typed; True is the value of a flag without one."""
    words = [f"{v:g}" for v in value] if isinstance(value, list) else [str(value)]
    return " ".join([parser.spelling[name], *([] if value is True else words)])


def fill_defaults(chosen: dict[str, Any], parser: Parser) -> Namespace:
    """Return all flags: the chosen ones, and the others with their defaults."""
    defaults = parser.defaults()
    defaults |= OPTIMIZER_DEFAULTS.get(chosen.get("optimizer", defaults["optimizer"]), {})
    return Namespace(**{**defaults, **chosen})


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
        *("sync_stats", "layout", "root", "root_final", "rows_per_feature"),
        *("freeze", "freeze_iter"),
    )
    return {name: getattr(flags, name) for name in unchanged} | {
        "block": flags.num_groups,
        "block_final": flags.num_groups_final,
        "n_iter": flags.deconv_iter,
        "sampling_stride": flags.stride,
        "shared": flags.share_blocks,
        "input_norm": {"layernorm": "layer", "l1norm": "l1"}.get(flags.norm_type, "none"),
    }
