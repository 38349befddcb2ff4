"""Flags that a resumed run takes over from its checkpoint, and those that must not change."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Collection, Mapping
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from util.checkpoint.schema import EARLIER
from util.checkpoint.store import check_compatible, list_checkpoints, load_checkpoint, load_newest
from util.cli.parser import Parser
from util.cli.script import Script
from util.console import print_line
from util.errors import CheckpointError, describe

# Never inherited. A file must not choose which paths are read and written, nor the machines.
OF_THIS_MACHINE = {
    *("config", "resume", "run_dir", "data", "data_url", "cache_dir", "out"),
    *("use_gpu", "gpu", "start_epoch"),
    *("evaluate", "per_class", "use_ema"),
    *("world_size", "rank", "dist_url", "dist_backend", "multiprocessing_distributed"),
}
MAY_CHANGE = OF_THIS_MACHINE | {
    *("epochs", "max_steps", "preset", "threads", "num_workers"),
    *("on_bad_image", "max_image_pixels"),
    *("deterministic", "compile", "cuda_graphs", "channels_last"),
    *("checkpoint_epoch", "checkpoint_hist", "checkpoint_steps", "print_freq", "msg"),
    *("save_plot", "tensorboardX"),
}
# All that --evaluate inherits: the flags of the model and of its test.
OF_NETWORK = {
    *("dataset", "loss"),
    *("arch", "method", "batchnorm", "bias", "deconv", "mode", "num_groups", "num_groups_final"),
    *("deconv_iter", "stem_iter", "eps", "stride", "layout", "share_blocks", "image_size"),
    *("root", "root_final", "rows_per_feature", "norm_type", "freeze", "freeze_iter", "pretrained"),
}
# Flags of other scripts that change the network, and the value for an unchanged one.
FOREIGN = {"rival": "none"}


def load_saved(script: Script, typed: dict[str, Any]) -> dict[str, Any] | None:
    """Load the checkpoint of --resume; return None for a fresh start.

    A run's folder stands for its newest readable checkpoint. `auto` stands for the folder of
    --run-dir, or for a fresh start if that holds no checkpoint.

    In `typed`, "resume" becomes the file that was loaded, or is removed.

    Raises:
        SystemExit: code 2, `--resume auto` without --run-dir.
        CheckpointError: no checkpoint can be read.
    """
    path = typed.get("resume")
    if path == "auto":
        if "run_dir" not in typed:
            script.parser.error("--resume auto needs --run-dir, the folder to search for one")
        path = typed["run_dir"]
        if not list_checkpoints(path):
            del typed["resume"]
            return None
        for name in ("start_epoch", "init"):  # applied to the first start only
            typed.pop(name, None)
    if path is None:
        return None
    if not os.path.isdir(path):
        return _load(script, path)
    path, saved, errors = load_newest(path, partial(_load, script))
    typed["resume"] = str(path)
    for error in errors:
        print_line(f"warning: {error}; taking {path}")
    return saved


def _load(script: Script, path: str | Path) -> dict[str, Any]:
    """Load a checkpoint whose flags could have been typed."""
    saved = load_checkpoint(path)
    check_config(script, saved["config"], path)
    return saved


def check_config(script: Script, config: dict[str, Any], file: str | Path) -> None:
    """Check that the flags in the checkpoint `file` could have been typed; add those of `EARLIER`.

    Raises:
        CheckpointError: names the first flag that could not have been typed.
    """
    parser, arch = script.parser, config.get("arch")
    if type(arch) is not str or arch not in script.architectures:
        reason = f"config.arch: {describe(arch)} is no architecture of {parser.prog}"
        owner = "main.py" if "dataset" in config else "main_imagenet.py"
        if type(arch) is str and owner != parser.prog:
            raise CheckpointError(f"{file}: arch {describe(arch)} is of {owner}; run that script")
        raise CheckpointError(f"{file}: damaged or foreign content: {reason}")
    for name, value in config.items():
        is_known = name in parser.spelling and name not in OF_THIS_MACHINE
        if is_known and (reason := parser.explain_misfit(name, value)):
            raise CheckpointError(f"{file}: damaged or foreign content: config.{name} {reason}")
    for name, value in FOREIGN.items():
        if name not in parser.spelling and config.get(name, value) != value:
            raise CheckpointError(
                f"{file}: has the layers of --{name} {config[name]}; only the script that trained "
                "it builds them"
            )
    for name, value in EARLIER.items():
        config.setdefault(name, value)


def inherit_flags(saved: Mapping[str, Any], typed: Collection[str], parser: Parser) -> dict:
    """Return the flags that a resumed run takes over from its checkpoint."""
    config = saved["config"]
    names = parser.spelling.keys() - OF_THIS_MACHINE
    if "evaluate" in typed:
        names &= OF_NETWORK
    is_reached = saved["progress"]["step"] >= (config.get("max_steps") or inf)  # and tested
    if "epochs" in typed or is_reached:  # or an inherited --max-steps would end the run early
        names -= {"max_steps"}
    return {name: config[name] for name in names & config.keys()}


def check_unchanged(
    flags: Namespace, typed: Collection[str], config: Mapping[str, Any], parser: Parser
) -> None:
    """Check that a resumed run uses the data and the flags `config` of its checkpoint.

    Raises:
        SystemExit: code 2, the images would be read from another place.
        CheckpointError: names the first flag that differs, and the remedy.
    """
    trained_on, is_chosen = config.get("data"), "data" in typed or getattr(flags, "dummy", False)
    if type(trained_on) is str and trained_on != flags.data and not is_chosen:
        parser.error(
            f"--resume {flags.resume}: was trained with {parser.spelling['data']} {trained_on}; "
            f"paths are not taken from a checkpoint, so give {parser.spelling['data']} again"
        )
    names = OF_NETWORK if flags.evaluate else parser.spelling.keys() - MAY_CHANGE
    names = names & (config.keys() | set(typed))
    # A checkpoint lacks the flags that were added after it: its run used their defaults.
    before, now = (
        {parser.spelling[name]: settings[name] for name in parser.spelling if name in names}
        for settings in ({**parser.defaults(), **config}, vars(flags))
    )
    try:
        check_compatible(before, now)
    except CheckpointError as error:
        place = f", also of --config {flags.config}" if flags.config else ""
        other = "" if flags.evaluate else f", or start a new run with --init {flags.resume}"
        raise CheckpointError(f"{error}; leave the flag out{place}{other}") from error
