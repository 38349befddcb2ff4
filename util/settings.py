"""From what was typed to the settings of a run.

No flag is parsed and ignored: one that would do nothing or contradicts another is refused by name.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .checkpoint import (
    CheckpointError,
    check_compatible,
    list_checkpoints,
    load_checkpoint,
    load_newest,
)
from .console import say
from .distributed import is_launched
from .parser import Parser
from .rules import describe

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
        say(f"warning: {fault}")
    if faults:
        say(f"going on from {path}, step {saved['step']}")
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
        if known and value is not None and (fault := parser.find_misfit(name, value)):
            raise CheckpointError(f"{file}: damaged or foreign content: config.{name} {fault}")
    if (arch := config.get("arch")) not in script.architectures:
        fault = f"config.arch: {describe(arch)} is no architecture of {parser.prog}"
        raise CheckpointError(f"{file}: damaged or foreign content: {fault}")


def refuse_other_data(
    flags: Namespace, typed: Collection[str], config: Mapping[str, Any], parser: Parser
) -> None:
    """End where a run would look for its pictures, or download them, elsewhere than before."""
    before, here = config.get("data"), "data" in typed or getattr(flags, "dummy", False)
    if type(before) is str and before != flags.data and not here:
        parser.error(
            f"--resume {flags.resume}: was trained with {parser.spelling['data']} {before}; "
            "places are not taken from a checkpoint, so say where the pictures are"
        )


def _spell(parser: Parser, flags: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Those of the flags that `names` has and the parser knows, as they are typed."""
    return {spelt: flags.get(name) for name, spelt in parser.spelling.items() if name in names}


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


def find_fault(flags: Namespace, typed: Collection[str], script: Script) -> tuple[str, str] | None:
    """The first typed flag that would do nothing or contradicts another, and what is wrong."""
    by_method = "method" in script.architectures[flags.arch]
    whitening = _method_rules(flags) if by_method else _deconv_rules(flags, typed)
    groups = _network_rules(flags, script.architectures), whitening, _training_rules(flags)
    for rules in (*groups, _device_rules(flags), _output_rules(flags), script.rules(flags)):
        for name, good, fault in rules:
            if name in typed and not good:
                return name, fault
    return None


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


def _network_rules(flags: Namespace, architectures: Architectures) -> Rules:
    options = architectures[flags.arch]
    for name in ("method", "dropout_rate"):
        takers = ", ".join(arch for arch, takes in architectures.items() if name in takes)
        idle = name not in options and getattr(flags, name, None)
        yield name, not idle, f"does not apply to {flags.arch}, only to {takers}"
    yield "batchnorm", not (flags.batchnorm and flags.deconv), "contradicts deconvolution"
    bias = not flags.bias or not flags.batchnorm or "method" in options
    yield "bias", bias, "contradicts BatchNorm, whose shift is the bias"


def _deconv_rules(flags: Namespace, typed: Collection[str]) -> Rules:
    for name in ("mode", "num_groups", "stride", "stem_iter", "root", "rows_per_feature"):
        yield name, flags.deconv, "needs --deconv True"
    sampled = flags.mode in (1, 2, 5)
    yield "rows_per_feature", sampled, f"does nothing in --mode {flags.mode}, needs 1, 2 or 5"
    for name in ("eps", "deconv_iter", "layout", "share_blocks", "sync_stats"):
        some = flags.deconv or flags.num_groups_final
        yield name, some, "needs --deconv True, or --num-groups-final above 0"
    every = flags.mode == 4 and flags.stride != 1
    yield "stride", not every, "contradicts --mode 4, which looks at every patch"
    blocks = not flags.deconv or flags.mode != 2 or flags.share_blocks is False
    final = "num_groups_final" in typed and flags.num_groups_final
    alike = "does nothing in --mode 2, where channels share one matrix; needs --share-blocks False"
    yield "num_groups", blocks, alike
    yield "layout", blocks or final, f"{alike}, or --num-groups-final above 0"


def _method_rules(flags: Namespace) -> Rules:
    """simple_v1 and mlp: the method decides which layers there are."""
    whitens, named = flags.method != 1, f"--method {flags.method}"
    for name, other in (("method", f"--deconv {flags.deconv}"), ("deconv", named)):
        yield name, flags.deconv == whitens, f"contradicts {other}"
    for name in ("mode", "num_groups", "root", "rows_per_feature"):
        yield name, False, f"does not apply to {flags.arch}, whose blocks --method decides"
    for name in ("eps", "deconv_iter", "sync_stats"):
        yield name, whitens or flags.num_groups_final, f"needs deconvolution, not {named}"
    yield "stem_iter", whitens, f"needs deconvolution, not {named}"
    yield "stride", flags.method == 2, f"needs --method 2, not {named}"
    for name in ("layout", "share_blocks"):
        some = flags.method == 4 or flags.num_groups_final
        final = "" if flags.arch == "simple_v1" else ", or --num-groups-final above 0"
        yield name, some, f"needs --method 4, not {named}{final}"
    if flags.arch == "simple_v1":
        yield "num_groups_final", False, "does not apply to simple_v1, which is one layer"
        yield "batchnorm", not flags.batchnorm, "does not apply to simple_v1, which is one layer"


def _training_rules(flags: Namespace) -> Rules:
    yield "momentum", flags.optimizer == "SGD", f"needs SGD, {flags.optimizer} has its own"
    drops = flags.lr_scheduler in ("multistep", "step")
    yield "milestone", flags.lr_scheduler == "multistep", "needs --lr-scheduler multistep"
    yield "multistep_gamma", drops, "needs --lr-scheduler multistep or step"
    yield "scheduler_step_size", flags.lr_scheduler == "step", "needs --lr-scheduler step"
    for name in ("milestone", "scheduler_step_size", "warmup_epochs", "start_epoch"):
        value = getattr(flags, name)
        late = max(value if isinstance(value, list) else [value]) >= flags.epochs
        yield name, not late, f"is not before the end, --epochs {flags.epochs}"
    yield "start_epoch", not flags.resume, "contradicts --resume, which knows its epoch"


def _device_rules(flags: Namespace) -> Rules:
    machines = flags.world_size or 1
    yield "gpu", flags.use_gpu is not False, "contradicts --use-gpu False"
    alone = flags.gpu is not None
    yield "multiprocessing_distributed", not alone, f"contradicts --gpu {flags.gpu}, one process"
    yield "rank", (flags.rank or 0) < machines, f"is not below --world-size {machines}"
    yield "dist_url", flags.world_size, "needs --world-size: on one machine none is used"
    known = is_launched() or {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    lost = machines > 1 and flags.dist_url == "env://" and not known
    yield "dist_url", not lost, "needs MASTER_ADDR and MASTER_PORT in the environment"
    together = machines == 1 or (flags.rank is not None and flags.dist_url is not None)
    yield "world_size", together, "needs --rank and --dist-url, to meet the other machines"
    started = int(os.environ.get("GROUP_WORLD_SIZE", machines))
    yield "world_size", machines == started, f"contradicts torchrun's --nnodes {started}"
    nccl = flags.dist_backend == "nccl" and flags.use_gpu is False
    yield "dist_backend", not nccl, "needs GPUs, contradicts --use-gpu False"


def _output_rules(flags: Namespace) -> Rules:
    cached, placed = getattr(flags, "dataset", None) == "folder", flags.run_dir or flags.resume
    yield "out", cached or not placed, "does nothing beside --run-dir or --resume"
    never = flags.checkpoint_epoch > flags.epochs
    yield "checkpoint_epoch", not never, f"is after the end, --epochs {flags.epochs}"
    beyond = flags.max_steps and flags.checkpoint_steps > flags.max_steps
    yield "checkpoint_steps", not beyond, f"is after the end, --max-steps {flags.max_steps}"


def describe_value(value: Any) -> str:
    """A flag's value as it is typed."""
    return " ".join(f"{v:g}" for v in value) if isinstance(value, list) else str(value)
