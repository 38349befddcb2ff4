"""TODO: util/cli/inherited.py."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from util.checkpoint.store import list_checkpoints, load_checkpoint, load_newest
from util.checkpoint.validators import describe
from util.cli.parser import Parser
from util.cli.script import Script
from util.console import print_line
from util.errors import CheckpointError

# What a continued run takes from its command line only, and what else may differ from before.
OF_THIS_MACHINE = {
    *("resume", "run_dir", "data", "data_url", "out"),  # a file must not say what is touched
    *("use_gpu", "gpu", "start_epoch"),
    *("evaluate", "pretrained"),
    *("world_size", "rank", "dist_url", "dist_backend", "multiprocessing_distributed"),
}
MAY_CHANGE = OF_THIS_MACHINE | {
    *("epochs", "max_steps", "preset", "on_bad_image", "threads", "num_workers"),
    *("deterministic", "compile", "cuda_graphs", "channels_last"),
    *("checkpoint_epoch", "checkpoint_steps", "print_freq", "msg", "save_plot", "tensorboardX"),
}

# What must be as it was where a network is only tested: itself, and what it is tested by.
OF_NETWORK = {
    *("dataset", "loss"),
    *("arch", "method", "batchnorm", "bias", "deconv", "mode", "num_groups", "num_groups_final"),
    *("deconv_iter", "stem_iter", "eps", "stride", "layout", "share_blocks", "image_size"),
    *("root", "rows_per_feature"),
}


def load_saved(script: Script, typed: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint that --resume asks for, whose file takes its place; None for a fresh start.

    A folder, that of a run, stands for its newest checkpoint that can be read; `auto` for the
    folder of --run-dir, or a fresh start where that has none.

    Raises:
        SystemExit: code 2, `auto` without --run-dir.
        CheckpointError: there is none that can be read.
    """
    asked = typed.get("resume")
    if asked == "auto":
        if "run_dir" not in typed:
            script.parser.error(
                "--resume auto needs --run-dir, the folder whose checkpoint it looks for"
            )
        asked = typed["run_dir"]
        if not list_checkpoints(asked):
            del typed["resume"]
            return None
        typed.pop("start_epoch", None)  # of the first start
    if asked is None or not os.path.isdir(asked):
        return None if asked is None else _load(script, asked)
    path, saved, faults = load_newest(asked, partial(_load, script))
    typed["resume"] = str(path)
    for fault in faults:
        print_line(f"warning: {fault}")
    if faults:
        print_line(f"going on from {path}, step {saved['step']}")
    return saved


def _load(script: Script, path: str | Path) -> dict[str, Any]:
    """The checkpoint at `path`, with settings that could have been typed."""
    saved = load_checkpoint(path, "cpu")
    check_config(script, saved["config"], path)
    return saved


def check_config(script: Script, config: Mapping[str, Any], file: str | Path) -> None:
    """See that the settings in a checkpoint, the content of `file`, could have been typed.

    Raises:
        CheckpointError: naming the first that could not.
    """
    parser = script.parser
    for name, value in config.items():
        known = name in parser.spelling and name not in OF_THIS_MACHINE
        if known and value is not None and (fault := parser.explain_misfit(name, value)):
            raise CheckpointError(f"{file}: damaged or foreign content: config.{name} {fault}")
    if (arch := config.get("arch")) not in script.architectures:
        fault = f"config.arch: {describe(arch)} is no architecture of {parser.prog}"
        raise CheckpointError(f"{file}: damaged or foreign content: {fault}")


def refuse_other_data(
    flags: Namespace, typed: Collection[str], config: Mapping[str, Any], parser: Parser
) -> None:
    """End where a run would look for its images, or download them, elsewhere than before."""
    before, here = config.get("data"), "data" in typed or getattr(flags, "dummy", False)
    if type(before) is str and before != flags.data and not here:
        parser.error(
            f"--resume {flags.resume}: was trained with {parser.spelling['data']} {before}; "
            "places are not taken from a checkpoint, so say where the images are"
        )


def _spell(parser: Parser, flags: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Those of the flags that `names` has and the parser knows, as they are typed."""
    return {spelt: flags.get(name) for name, spelt in parser.spelling.items() if name in names}
