"""Session of a script: train or test a model on a dataset as the flags say."""

from __future__ import annotations

import math
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from util.checkpoint.store import LATEST_NAME
from util.console import print_line
from util.data.datasets import is_embedded
from util.data.images import DataSpec
from util.data.loader import ImageLoader, LoaderOptions
from util.device import choose_graphs
from util.distributed.world import World
from util.errors import RunError, Stopped
from util.random_state import seed_everything
from util.training.accelerator import Accelerator
from util.training.confusion import ConfusionMatrix, report_classes
from util.training.cuda_graphs import check_messages
from util.training.ema import ExponentialAverage, check_decay
from util.training.engine import evaluate
from util.training.hooks import ModelHooks
from util.training.micro_batches import check_batch_size
from util.training.optim import (
    build_criterion,
    build_optimizer,
    build_scheduler,
    group_parameters,
)
from util.training.recorder import NullRecorder, Recorder
from util.training.reopen import describe_position, reopen_epoch
from util.training.resume import Plan, Progress, TrainingState, list_skipped, restore_model
from util.training.signals import stop_on_signal
from util.training.trainer import Trainer

Data = tuple[DataSpec, ImageLoader | None, ImageLoader]


@dataclass(frozen=True)
class RunContext:
    """Surroundings of a run, in one of its processes.

    Attributes:
        flags: all settings.
        saved: the checkpoint to continue; None: a fresh start.
        world: all ranks of the run.
        device: device of this process.
        run_dir: folder that the flags name; None: a new folder.
    """

    flags: Namespace
    saved: dict[str, Any] | None
    world: World
    device: torch.device
    run_dir: Path | None

    def build_accelerator(self) -> Accelerator:
        """Return the device, the precision and the memory format that the flags choose."""
        flags, device = self.flags, self.device
        # The graph of a micro-batch would overwrite the gradients of the one before.
        graphs = flags.cuda_graphs if flags.accum_steps == 1 else False
        return Accelerator(
            device,
            amp=flags.amp,
            channels_last=flags.channels_last,
            compiled=flags.compile,
            cuda_graphs=choose_graphs(graphs, device, self.world.size, flags.compile),
            clip_grad=flags.clip_grad,
        )

    def loader_options(self) -> LoaderOptions:
        """Return the options of this rank's loaders."""
        flags, world = self.flags, self.world
        return LoaderOptions(
            batch_size=flags.batch_size,
            image_size=flags.image_size,
            num_workers=world.workers_per_process(flags.num_workers),
            seed=flags.seed,
            device_type=self.device.type,
            rank=world.rank,
            processes=world.size,
            auto_augment=flags.auto_augment,
            random_erase=flags.random_erase,
            mixup=flags.mixup,
            cutmix=flags.cutmix,
            on_bad_image=flags.on_bad_image,
            val_split=flags.val_split,
            max_image_pixels=flags.max_image_pixels,
        )


def optimizer_from_flags(flags: Namespace, model: nn.Module) -> Optimizer:
    """Return the optimizer that the flags describe."""
    rates = {"lr": flags.lr, "momentum": flags.momentum, "weight_decay": flags.weight_decay}
    decays_all = not flags.no_decay_norm_bias
    groups = group_parameters(model, flags.optimizer, decay_norm_bias=decays_all)
    fused = next(model.parameters()).is_cuda
    return build_optimizer(flags.optimizer, groups, **rates, fused=fused)


def scheduler_from_flags(
    flags: Namespace, optimizer: Optimizer, plan: Plan, start_step: int
) -> LRScheduler:
    """Return the learning rate schedule that the flags describe, from step `start_step` on."""
    return build_scheduler(
        flags.lr_scheduler,
        optimizer,
        total_steps=plan.total_steps,
        epoch_steps=plan.epoch_steps,
        milestones=flags.milestone,
        gamma=flags.multistep_gamma,
        step_size=flags.scheduler_step_size,
        warmup_epochs=flags.warmup_epochs,
        start_step=start_step,
    )


@dataclass(frozen=True)
class Builders:
    """Functions that build the optimizer and the schedule of a run; the defaults follow the flags.

    Attributes:
        optimizer: (flags, model) -> optimizer of the model's parameters.
        scheduler: (flags, optimizer, plan, finished steps) -> schedule of the learning rates.
    """

    optimizer: Callable[[Namespace, nn.Module], Optimizer] = optimizer_from_flags
    scheduler: Callable[[Namespace, Optimizer, Plan, int], LRScheduler] = scheduler_from_flags


def fit(
    context: RunContext,
    data: Data,
    model: nn.Module,
    *,
    hooks: ModelHooks,
    max_batches: int = sys.maxsize,
    builders: Builders = Builders(),
) -> None:
    """Train `model`, on the CPU, to the end of the run.

    An epoch and a test have at most `max_batches` batches.
    """
    flags, saved, world = context.flags, context.saved, context.world
    spec, train_loader, test_loader = data
    epoch_steps = min(len(train_loader), max_batches)
    total_steps = min(flags.epochs * epoch_steps, flags.max_steps or sys.maxsize)
    sizes = len(train_loader.dataset), flags.batch_size, world.size, flags.accum_steps
    reaches_rest = min(epoch_steps, total_steps) == len(train_loader)
    check_batch_size(model, *sizes, allow_rest=saved is not None or not reaches_rest)
    test_batches = world.shard_count(max_batches)
    micro_batch = math.ceil(flags.batch_size / flags.accum_steps)
    plan = Plan(epoch_steps, total_steps, test_batches, flags.checkpoint_steps, micro_batch)
    start = Progress(flags.start_epoch, flags.start_epoch * epoch_steps)
    if start.step >= total_steps and not saved:
        raise RunError(
            f"--start-epoch {flags.start_epoch}: its {start.step} steps are not before the end, "
            f"--max-steps {flags.max_steps}"
        )
    accelerator = context.build_accelerator()
    accelerator.to_device(model)
    optimizer = builders.optimizer(flags, model)
    if accelerator.cuda_graphs:
        check_messages(model, world.size)
    part = world.shard_count(flags.batch_size)  # images of a full batch in this process
    shape = part, spec.in_channels, spec.image_size, spec.image_size
    replica = world.replicate(accelerator.compile_for_training(model, shape, hooks))
    validation = train_loader.validation
    loaders = train_loader, test_loader, *([] if validation is None else [validation])
    state = TrainingState(vars(flags), spec, loaders, model, optimizer, accelerator, world, start)
    if flags.ema is not None:
        if not saved:
            check_decay(flags.ema, total_steps)
        state.average = ExponentialAverage(model, flags.ema)
    seed_everything(flags.seed + world.rank)  # dropout differs between ranks
    if saved:
        if saved["progress"]["step"] < total_steps:
            saved = reopen_epoch(saved, epoch_steps)
        state.restore(saved, plan, file=flags.resume)
    if state.progress.step >= total_steps:
        print_line(
            f"{flags.resume} is finished: {state.progress.step} of {total_steps} steps; "
            "--epochs N or --max-steps N continues it"
        )
        return
    scheduler = builders.scheduler(flags, optimizer, plan, state.step)
    criteria = (
        build_criterion(flags.loss, spec.num_classes, flags.label_smoothing),
        build_criterion(flags.loss, spec.num_classes),
    )
    if saved:
        print_line(describe_position(flags, saved["config"], state, plan, scheduler))
    recorder = NullRecorder()
    if world.is_first:
        recorder = Recorder(flags, saved, context.run_dir, state, plan)
    ended = exit_when_stopped(recorder.run_dir, format_data_flag(flags))
    with ended, closing(recorder), stop_on_signal() as stop_request:
        Trainer(state, plan, replica, criteria, scheduler, recorder, hooks, stop_request).run()


def evaluate_only(
    context: RunContext,
    data: Data,
    model: nn.Module,
    *,
    hooks: ModelHooks,
    max_batches: int = sys.maxsize,
) -> None:
    """Print the test metrics of a model, with the checkpoint's weights if there is one."""
    flags, world = context.flags, context.world
    spec, _, loader = data
    accelerator = context.build_accelerator()
    accelerator.to_device(model)
    if context.saved:
        choice = {"file": flags.resume, "use_ema": flags.use_ema}
        restore_model(context.saved, model, spec=spec, **choice)
        if context.saved["config"].get("ema") is not None:
            other = "trained weights, not the " if flags.use_ema is False else ""
            print_line(f"testing the {other}moving average of --ema")
    matrix, criterion = None, build_criterion(flags.loss, spec.num_classes)
    if flags.per_class:
        matrix = ConfusionMatrix(spec.num_classes)
        criterion = matrix.watch(criterion)
    metrics = evaluate(
        accelerator.compile(hooks.eval_model(model.eval())),
        loader,
        criterion,
        accelerator=accelerator,
        world=world,
        max_steps=world.shard_count(max_batches),
    )
    for name in list_skipped(world, loader):
        print_line(f"skipped {name}: the image cannot be decoded")
    print_line(
        f"{flags.arch}  test loss {metrics['loss']:.4f} top1 {metrics['top1']:.2f}%"
        f" top5 {metrics['top5']:.2f}%  {metrics['images']} images  {metrics['seconds']:.1f} s"
    )
    if matrix:
        counts = sum(world.gather(matrix.counts))
        folder = Path(flags.resume).resolve().parent
        world.on_rank0(partial(report_classes, counts, spec.classes, folder))


@contextmanager
def exit_when_stopped(run_dir: Path | None, data_flag: str = "") -> Iterator[None]:
    """Turn Ctrl-C and `Stopped` into an exit code, and one line that names the last checkpoint.

    Args:
        run_dir: folder of the run; None: print nothing.
        data_flag: words that name the images on the command line; no checkpoint holds them.
    """
    try:
        yield
    except (KeyboardInterrupt, Stopped) as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        if run_dir is not None:
            path = run_dir / LATEST_NAME
            words = " ".join(["--resume", shlex.quote(str(path)), *filter(None, [data_flag])])
            hint = f"continue with {words}" if path.exists() else "no checkpoint was saved yet"
            with suppress(OSError):  # the terminal may be gone
                print(f"\ninterrupted: {hint}", file=sys.stderr)
        sys.exit(128 + number)


def format_data_flag(flags: Namespace) -> str:
    """Return the words that name the images on the command line: --data DIR, or DIR alone."""
    if is_embedded(getattr(flags, "dataset", None)):  # refuses --data
        return ""
    words = [] if flags.data is None else [flags.data]
    return shlex.join(["--data", *words] if hasattr(flags, "dataset") else words)
