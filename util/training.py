"""The story both scripts share once they have pictures and a network: train, test, keep.

Beside `settings.py` and `launch.py` the only module that reads the flags; what it calls takes plain
values.
"""

from __future__ import annotations

import math
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

from . import run
from .checkpoint import rng_state, set_rng_state
from .compute import Compute
from .console import say
from .data import DataSpec
from .distributed import World
from .engine import evaluate, train_one_epoch
from .loaders import PictureLoader
from .optim import build_criterion, build_optimizer, build_scheduler
from .progress import Progress, restore, snapshot
from .recorder import NullRecorder, Recorder


@dataclass(frozen=True)
class Session:
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
        return self.world.first(partial(run.find_run_dir, self.flags.run_dir, self.flags.resume))


def fit(
    session: Session,
    run_dir: Path | None,
    name: str,
    kind: str,
    spec: DataSpec,
    model: nn.Module,
    train_loader: PictureLoader,
    test_loader: PictureLoader,
    *,
    limit: int = sys.maxsize,
) -> None:
    """Train `model` to the end of the run, or take up its checkpoint and go on.

    Args:
        run_dir: where the run is kept; None: in a new folder under `name`.
        name, kind: of the run and of its layers, for those who read about it.
        limit: batches of an epoch, and of a test, at most.
    """
    flags, saved, world = session.flags, session.saved, session.world
    compute = Compute(session.device, amp=flags.amp, channels_last=flags.channels_last)
    run.check_last_batch(model, len(train_loader.dataset), flags.batch_size, world.size)
    compute.place(model)
    optimizer = choose_optimizer(flags, model)
    epoch_steps = min(len(train_loader), limit)
    total_steps = min(flags.epochs * epoch_steps, flags.max_steps or sys.maxsize)
    done = Progress(epoch=flags.start_epoch, step=flags.start_epoch * epoch_steps)
    if saved:
        counts = {"epoch_steps": epoch_steps, "total_steps": total_steps}
        done = restore(saved, model, optimizer, compute, spec=asdict(spec), **counts)
    if done.step >= total_steps:
        say(f"{flags.resume} is finished: {done.step} steps of {total_steps} asked for")
        return
    scheduler = choose_schedule(flags, optimizer, total_steps, epoch_steps, done.step)
    epochs = math.ceil(total_steps / epoch_steps)
    parts = {"model": model, "done": done, "device": session.device, "epochs": epochs}
    recorder = NullRecorder()
    if world.is_first:
        recorder = Recorder(
            flags,
            saved,
            run_dir,
            name,
            describe_run(flags, kind, model) | {"epoch_steps": epoch_steps},
            processes=world.size,
            **parts,
        )
    with run.tell_where_to_continue(recorder.run_dir), closing(recorder):
        if saved:
            take_up_rng(saved["rng"], world, flags.seed)
        else:
            run.seed_everything(flags.seed + world.rank)  # dropout differs between processes
        network = torch.compile(model) if flags.compile else model
        replica = world.replicate(network)
        criterion = build_criterion(flags.loss, spec.num_classes)
        while done.step < total_steps:
            train_loader.batch_sampler.set_epoch(done.epoch + 1)
            trained = train_one_epoch(
                replica,
                train_loader,
                criterion,
                optimizer,
                scheduler,
                compute=compute,
                world=world,
                max_steps=min(epoch_steps, total_steps - done.step),
                on_batch=recorder.batch,
                report_every=1 if flags.msg else flags.print_freq,
                title=f"epoch {done.epoch + 1}/{epochs}",
            )
            world.average_buffers(model)
            tested = evaluate(
                network,
                test_loader,
                criterion,
                compute=compute,
                world=world,
                max_steps=len(range(world.rank, limit, world.size)),  # dealt in turn
            )
            done.finish_epoch(trained, tested)
            state = {
                **snapshot(done, model, optimizer, compute),
                "config": vars(flags),
                "spec": asdict(spec),
                "rng": world.gather(rng_state()),
            }
            recorder.epoch(trained, tested, state)
            recorder.skipped(list_skipped(world, train_loader, test_loader))


def list_skipped(world: World, *loaders: PictureLoader) -> list[str]:
    """The bad files that any process has left out so far, in order."""
    mine = set().union(*(loader.skipped for loader in loaders))
    return sorted(set().union(*world.gather(mine)))


def choose_optimizer(flags: Namespace, model: nn.Module) -> Optimizer:
    return build_optimizer(
        flags.optimizer,
        model.parameters(),
        lr=flags.lr,
        momentum=flags.momentum,
        weight_decay=flags.weight_decay,
    )


def choose_schedule(
    flags: Namespace, optimizer: Optimizer, total_steps: int, epoch_steps: int, start_step: int
) -> LRScheduler:
    return build_scheduler(
        flags.lr_scheduler,
        optimizer,
        total_steps=total_steps,
        epoch_steps=epoch_steps,
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


def take_up_rng(saved: list[dict[str, Any]], world: World, seed: int) -> None:
    """Put back the random state of this process; with other processes than before, a new one."""
    if len(saved) == world.size:
        set_rng_state(saved[world.rank])
    else:
        run.seed_everything(seed + world.rank)
