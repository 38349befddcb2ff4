"""TODO: util/cli/flag_rules.py."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Collection
from typing import Any

from util.cli.script import Architectures, Rules, Script
from util.distributed.launcher import is_launched


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
