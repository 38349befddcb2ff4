"""Rules that refuse flags without effect and flags that contradict others."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Collection, Mapping
from itertools import chain

from util.cli.script import Network, Rules, Script
from util.distributed.launcher import is_launched


def find_fault(flags: Namespace, typed: Collection[str], script: Script) -> tuple[str, str] | None:
    """Return the first typed flag that breaks a rule, with the reason and the remedy."""
    has_method = "method" in script.architectures[flags.arch].options
    rules = chain(
        _network_rules(flags, script.architectures),
        _method_rules(flags) if has_method else _deconv_rules(flags, typed),
        _training_rules(flags),
        _device_rules(flags),
        _output_rules(flags),
        script.rules(flags),
    )
    for name, is_allowed, reason in rules:
        if name in typed and not is_allowed:
            return name, reason
    return None


def _network_rules(flags: Namespace, architectures: Mapping[str, Network]) -> Rules:
    options = architectures[flags.arch].options
    for name in ("method", "dropout_rate"):
        others = ", ".join(arch for arch, entry in architectures.items() if name in entry.options)
        has_effect = name in options or not getattr(flags, name, None)
        yield name, has_effect, f"does not apply to {flags.arch}, only to {others}"
    yield "freeze_iter", flags.freeze, "needs --freeze True"
    reason = "contradicts deconvolution, which replaces BatchNorm; leave one of them out"
    yield "batchnorm", not (flags.batchnorm and flags.deconv), reason
    has_no_shift = not flags.batchnorm or "method" in options
    reason = "contradicts BatchNorm, whose shift is the bias; leave it out or add --batchnorm False"
    yield "bias", not flags.bias or has_no_shift, reason


def _deconv_rules(flags: Namespace, typed: Collection[str]) -> Rules:
    for name in ("mode", "num_groups", "stride", "stem_iter", "root", "rows_per_feature", "freeze"):
        yield name, flags.deconv, "needs --deconv True"
    samples = flags.mode in (1, 2, 5)
    yield "rows_per_feature", samples, f"has no effect in --mode {flags.mode}, needs 1, 2 or 5"
    whitens = flags.deconv or flags.num_groups_final
    for name in ("eps", "deconv_iter", "layout", "share_blocks", "sync_stats", "norm_type"):
        yield name, whitens, "needs --deconv True, or --num-groups-final above 0"
    yield "root_final", flags.num_groups_final, "needs --num-groups-final above 0"
    reason = "contradicts --mode 4, which uses every patch; leave it out or choose --mode 5"
    yield "stride", flags.mode != 4 or flags.stride == 1, reason
    has_blocks = not flags.deconv or flags.mode != 2 or flags.share_blocks is False
    whitens_final = "num_groups_final" in typed and flags.num_groups_final
    needs = "where all channels share one matrix; needs --share-blocks False"
    reason = f"has no effect in --mode 2, {needs}"
    yield "num_groups", has_blocks, reason
    yield "layout", has_blocks or whitens_final, f"{reason}, or --num-groups-final above 0"


def _method_rules(flags: Namespace) -> Rules:
    """Yield the rules of simple_v1 and mlp, whose layers depend on --method."""
    whitens, method = flags.method != 1, f"--method {flags.method}"
    for name, other in (("method", f"--deconv {flags.deconv}"), ("deconv", method)):
        yield name, flags.deconv == whitens, f"contradicts {other}; leave one of them out"
    for name in ("mode", "num_groups", "root", "rows_per_feature"):
        yield name, False, f"does not apply to {flags.arch}, whose blocks depend on --method"
    for name in ("eps", "deconv_iter", "root_final", "sync_stats", "norm_type"):
        yield name, whitens or flags.num_groups_final, f"needs deconvolution, not {method}"
    for name in ("stem_iter", "freeze"):
        yield name, whitens, f"needs deconvolution, not {method}"
    yield "stride", flags.method == 2, f"needs --method 2, not {method}"
    for name in ("layout", "share_blocks"):
        has_blocks = flags.method == 4 or flags.num_groups_final
        final = "" if flags.arch == "simple_v1" else ", or --num-groups-final above 0"
        yield name, has_blocks, f"needs --method 4, not {method}{final}"
    if flags.arch == "simple_v1":
        yield "num_groups_final", False, "does not apply to simple_v1, which is one layer"
        yield "batchnorm", not flags.batchnorm, "does not apply to simple_v1, which is one layer"


def _training_rules(flags: Namespace) -> Rules:
    is_sgd = flags.optimizer == "SGD"
    yield "momentum", is_sgd, f"needs --optimizer SGD, {flags.optimizer} has its own"
    is_smoothed = flags.label_smoothing > 0
    yield "label_smoothing", flags.loss == "CE" or not is_smoothed, "needs --loss CE"
    for name in ("mixup", "cutmix"):
        alpha, reason = getattr(flags, name), "must be 0 or at least 0.01, else shares underflow"
        yield name, alpha == 0 or alpha >= 0.01, reason
        reason = "needs another image in the batch; choose --batch-size 2 or more"
        yield name, alpha == 0 or flags.batch_size > 1, reason
    is_multistep, is_step = (flags.lr_scheduler == name for name in ("multistep", "step"))
    yield "milestone", is_multistep, "needs --lr-scheduler multistep"
    yield "multistep_gamma", is_multistep or is_step, "needs --lr-scheduler multistep or step"
    yield "scheduler_step_size", is_step, "needs --lr-scheduler step"
    for name in ("milestone", "scheduler_step_size", "warmup_epochs", "start_epoch"):
        value = getattr(flags, name)
        last = max(value) if isinstance(value, list) else value
        yield name, last < flags.epochs, f"must be below --epochs {flags.epochs}"
    yield "start_epoch", not flags.resume, "contradicts --resume, which knows its epoch"
    reason = f"must not exceed --batch-size {flags.batch_size}"
    yield "accum_steps", flags.accum_steps <= flags.batch_size, reason
    yield "use_ema", flags.evaluate and flags.resume, "needs -e --resume RUN"
    accumulates = flags.accum_steps > 1
    reason = f"contradicts --accum-steps {flags.accum_steps}; leave one of them out"
    yield "cuda_graphs", not (accumulates and flags.cuda_graphs), reason


def _device_rules(flags: Namespace) -> Rules:
    machines = flags.world_size or 1
    yield "gpu", flags.use_gpu is not False, "contradicts --use-gpu False; leave one of them out"
    name, is_on = "multiprocessing_distributed", flags.multiprocessing_distributed
    yield name, is_on, "has no effect, every GPU has its process; choose one GPU with --gpu N"
    reason = f"contradicts --gpu {flags.gpu}, which starts one process; leave one of them out"
    yield name, flags.gpu is None, reason
    yield "rank", (flags.rank or 0) < machines, f"must be below --world-size {machines}"
    yield "dist_url", flags.world_size, "needs --world-size; a single machine uses no URL"
    has_address = is_launched() or {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    is_lost = machines > 1 and flags.dist_url == "env://" and not has_address
    yield "dist_url", not is_lost, "needs MASTER_ADDR and MASTER_PORT in the environment"
    can_meet = machines == 1 or (flags.rank is not None and flags.dist_url is not None)
    yield "world_size", can_meet, "needs --rank and --dist-url to reach the other machines"
    started = int(os.environ.get("GROUP_WORLD_SIZE", machines))
    yield "world_size", machines == started, f"contradicts torchrun's --nnodes {started}"
    is_nccl_on_cpu = flags.dist_backend == "nccl" and flags.use_gpu is False
    yield "dist_backend", not is_nccl_on_cpu, "needs GPUs, contradicts --use-gpu False"


def _output_rules(flags: Namespace) -> Rules:
    reason = "contradicts --resume, which continues with its own weights; leave one of them out"
    yield "init", not flags.resume, reason
    yield "init", not flags.evaluate, "contradicts -e, which tests a run; use -e --resume RUN"
    caches = getattr(flags, "dataset", None) == "folder"
    has_folder = flags.run_dir or flags.resume
    yield "out", caches or not has_folder, "has no effect with --run-dir or --resume; leave it out"
    is_test = flags.evaluate and flags.resume
    reason = "needs -e --resume RUN, whose folder receives the confusion matrix"
    yield "per_class", is_test or not flags.per_class, reason
    ends_before = flags.checkpoint_epoch > flags.epochs
    yield "checkpoint_epoch", not ends_before, f"must not exceed --epochs {flags.epochs}"
    ends_before = flags.max_steps and flags.checkpoint_steps > flags.max_steps
    yield "checkpoint_steps", not ends_before, f"must not exceed --max-steps {flags.max_steps}"
