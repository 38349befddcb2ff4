"""The story both scripts share once they have images and a network: train, test, keep.

Beside `settings.py` and `launch.py` the only module that reads the flags; what it calls takes plain
values.
"""

from __future__ import annotations

import math
import shlex
import sys
from argparse import Namespace
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from util.console import print_line
from util.data.datasets import is_embedded
from util.data.images import DataSpec
from util.data.loader import ImageLoader, count_images
from util.device import choose_graphs
from util.distributed.world import World
from util.errors import RunError
from util.random_state import seed_everything, set_rng_state
from util.tracking.run_dir import find_run_dir
from util.training.accelerator import Accelerator
from util.training.engine import evaluate
from util.training.hooks import ModelHooks
from util.training.metrics import EpochMetrics
from util.training.optim import build_criterion, build_optimizer, build_scheduler
from util.training.recorder import NullRecorder, Recorder
from util.training.resume import Progress, restore, restore_model
from util.training.signals import heed_signals, tell_where_to_continue
from util.training.trainer import Trainer, list_skipped


@dataclass(frozen=True)
class RunContext:
    """What a process of a run is given to work with.

    Attributes:
        flags: all settings.
        saved: the checkpoint to continue, None for a fresh start.
        world: the processes of the run.
        device: of this process.
    """

    flags: Namespace
    saved: dict[str, Any] | None
    world: World
    device: torch.device

    def find_run_dir(self) -> Path | None:
        """The folder that the flags ask for; None where a new one is to be made."""
        return self.world.on_rank0(partial(find_run_dir, self.flags.run_dir, self.flags.resume))


@dataclass(frozen=True)
class Plan:
    """How long a run is: optimizer steps of an epoch and in all, and the epochs they make."""

    epoch_steps: int
    total_steps: int

    @property
    def epochs(self) -> int:
        return math.ceil(self.total_steps / self.epoch_steps)


def fit(
    context: RunContext,
    run_dir: Path | None,
    name: str,
    kind: str,
    spec: DataSpec,
    model: nn.Module,
    train_loader: ImageLoader,
    test_loader: ImageLoader,
    *,
    limit: int = sys.maxsize,
    hooks: ModelHooks = ModelHooks(),  # noqa: B008 - frozen
) -> None:
    """Train `model` to the end of the run, or take up its checkpoint and go on.

    Args:
        run_dir: where the run is kept; None: in a new folder under `name`.
        name, kind: of the run and of its layers, for those who read about it.
        limit: batches of an epoch, and of a test, at most.
        hooks: how the network wants to be run.
    """
    flags, saved, world = context.flags, context.saved, context.world
    check_last_batch(model, len(train_loader.dataset), flags.batch_size, world.size)
    accelerator = choose_accelerator(context)
    accelerator.to_device(model)
    optimizer = choose_optimizer(flags, model)
    epoch_steps = min(len(train_loader), limit)
    total_steps = min(flags.epochs * epoch_steps, flags.max_steps or sys.maxsize)
    plan = Plan(epoch_steps, total_steps)
    done, meters = Progress(flags.start_epoch, flags.start_epoch * epoch_steps), EpochMetrics()
    if saved:
        data = {"spec": asdict(spec), "images": count_images(train_loader, test_loader)}
        places = model, optimizer, accelerator
        done, meters = restore(saved, *places, file=flags.resume, **data, **asdict(plan))
        train_loader.skipped.update(saved.get("skipped", ()))
    if done.step >= total_steps and not saved:
        raise RunError(
            f"--start-epoch {flags.start_epoch}: its {done.step} steps are not before the end, "
            f"--max-steps {flags.max_steps}"
        )
    if done.step >= total_steps:
        print_line(
            f"{flags.resume or name} is finished: {done.step} steps of {total_steps} asked for"
        )
        return
    scheduler = choose_schedule(flags, optimizer, plan, done.step + meters.steps)
    recorder = open_recorder(context, run_dir, name, kind, model, done, meters, plan)
    ended = tell_where_to_continue(recorder.run_dir, name_images(flags))
    with ended, closing(recorder), heed_signals() as stop_request:
        seed_process(context)
        Trainer(
            vars(flags),
            spec,
            world,
            accelerator,
            model,
            build_criterion(flags.loss, spec.num_classes),
            optimizer,
            scheduler,
            train_loader,
            test_loader,
            recorder,
            done,
            meters,
            **asdict(plan),
            epochs=plan.epochs,
            test_batches=world.shard_count(limit),
            save_every=flags.checkpoint_steps,
            stop_request=stop_request,
            hooks=hooks,
            own_buffers=saved.get("own_buffers", ()) if saved else (),
        ).run()


def test(
    context: RunContext,
    spec: DataSpec,
    model: nn.Module,
    loader: ImageLoader,
    *,
    limit: int = sys.maxsize,
    hooks: ModelHooks = ModelHooks(),  # noqa: B008 - frozen
) -> None:
    """Say how good a finished network is, that of the checkpoint if there is one; keep nothing.

    Args:
        limit, hooks: as of `fit`.
    """
    flags, world = context.flags, context.world
    accelerator = choose_accelerator(context)
    accelerator.to_device(model)
    if context.saved:
        restore_model(context.saved, model, file=flags.resume, spec=asdict(spec))
    criterion = build_criterion(flags.loss, spec.num_classes)
    network = accelerator.compile(hooks.eval_model(model.eval()))
    steps = world.shard_count(limit)
    figures = evaluate(
        network, loader, criterion, accelerator=accelerator, world=world, max_steps=steps
    )
    for name in list_skipped(world, loader):
        print_line(f"left out: {name} cannot be decoded")
    print_line(
        f"{flags.arch}  test loss {figures['loss']:.4f} top1 {figures['top1']:.2f}%"
        f" top5 {figures['top5']:.2f}%  {figures['images']} images  {figures['seconds']:.1f} s"
    )


def open_recorder(
    context: RunContext,
    run_dir: Path | None,
    name: str,
    kind: str,
    model: nn.Module,
    done: Progress,
    meters: EpochMetrics,
    plan: Plan,
) -> Recorder | NullRecorder:
    """What keeps the run, in the first process; in the others what keeps nothing."""
    if not context.world.is_first:
        return NullRecorder()
    facts = describe_run(context.flags, kind, model) | {"epoch_steps": plan.epoch_steps}
    return Recorder(
        context.flags,
        context.saved,
        run_dir,
        name,
        facts,
        model=model,
        done=done,
        meters=meters,
        device=context.device,
        processes=context.world.size,
        epochs=plan.epochs,
    )


def seed_process(context: RunContext) -> None:
    """Random numbers of its own for each process, as dropout wants them.

    A continued run goes on with those of before, if it has as many processes.
    """
    saved, world = context.saved, context.world
    if saved and len(saved["rng"]) == world.size:
        set_rng_state(saved["rng"][world.rank])
    else:
        seed_everything(context.flags.seed + world.rank)


def choose_accelerator(context: RunContext) -> Accelerator:
    flags, world = context.flags, context.world
    return Accelerator(
        context.device,
        amp=flags.amp,
        channels_last=flags.channels_last,
        compiled=flags.compile,
        replays=choose_graphs(flags.cuda_graphs, context.device, world.size, flags.compile),
    )


def choose_optimizer(flags: Namespace, model: nn.Module) -> Optimizer:
    return build_optimizer(
        flags.optimizer,
        model.parameters(),
        lr=flags.lr,
        momentum=flags.momentum,
        weight_decay=flags.weight_decay,
    )


def name_images(flags: Namespace) -> str:
    """The words of the command line that tell where the images are: --data DIR, or DIR alone."""
    if is_embedded(getattr(flags, "dataset", None)):  # refuses --data
        return ""
    words = [] if flags.data is None else [flags.data]
    return shlex.join(["--data", *words] if hasattr(flags, "dataset") else words)


def choose_schedule(
    flags: Namespace, optimizer: Optimizer, plan: Plan, start_step: int
) -> LRScheduler:
    return build_scheduler(
        flags.lr_scheduler,
        optimizer,
        **asdict(plan),
        milestones=flags.milestone,
        gamma=flags.multistep_gamma,
        step_size=flags.scheduler_step_size,
        warmup_epochs=flags.warmup_epochs,
        start_step=start_step,
    )


def describe_kind(flags: Namespace) -> str:
    """A word for the layers of a network: bn, deconv-mode5, plain."""
    return f"deconv-mode{flags.mode}" if flags.deconv else "bn" if flags.batchnorm else "plain"


def describe_run(flags: Namespace, kind: str, model: nn.Module) -> dict[str, Any]:
    """What summary.json says beside the figures."""
    names = ("arch", "dataset", "seed", "batch_size", "optimizer", "lr", "weight_decay", "amp")
    return {
        "kind": kind,
        **{name: getattr(flags, name) for name in names if hasattr(flags, name)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def check_last_batch(model: nn.Module, images: int, batch_size: int, processes: int = 1) -> None:
    """See that BatchNorm1d, which has no variance of one image alone, never meets one.

    Raises:
        RunError: some process's share of the last batch of `images` images is a single one; or
            there are more processes than images in a batch.
    """
    if batch_size < processes:
        raise RunError(f"--batch-size {batch_size}: fewer images than the {processes} processes")
    last = images % batch_size or batch_size
    single = last // processes == 1 or -(-last // processes) == 1
    if single and any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
        among = f", shared by {processes} processes" if processes > 1 else ""
        raise RunError(
            f"--batch-size {batch_size}: the last batch of {images} images is of {last}{among}: "
            "one alone is too few for BatchNorm1d; choose another size or --batchnorm False"
        )
