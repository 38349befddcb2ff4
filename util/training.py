"""The story both scripts share once they have pictures and a network: train, test, keep.

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

from . import run
from .checkpoint import set_rng_state
from .compute import Compute
from .console import say
from .data import DataSpec
from .distributed import World
from .engine import Meters, Ways, evaluate
from .epochs import Epochs, list_skipped
from .loaders import PictureLoader, count_pictures
from .optim import build_criterion, build_optimizer, build_scheduler
from .progress import Progress, restore, restore_model
from .recorder import NullRecorder, Recorder
from .signals import heed_signals


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


@dataclass(frozen=True)
class Plan:
    """How long a run is: optimizer steps of an epoch and in all, and the epochs they make."""

    epoch_steps: int
    total_steps: int

    @property
    def epochs(self) -> int:
        return math.ceil(self.total_steps / self.epoch_steps)


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
    ways: Ways = Ways(),  # noqa: B008 - frozen
) -> None:
    """Train `model` to the end of the run, or take up its checkpoint and go on.

    Args:
        run_dir: where the run is kept; None: in a new folder under `name`.
        name, kind: of the run and of its layers, for those who read about it.
        limit: batches of an epoch, and of a test, at most.
        ways: how the network wants to be run.
    """
    flags, saved, world = session.flags, session.saved, session.world
    run.check_last_batch(model, len(train_loader.dataset), flags.batch_size, world.size)
    compute = choose_compute(session)
    compute.place(model)
    optimizer = choose_optimizer(flags, model)
    epoch_steps = min(len(train_loader), limit)
    total_steps = min(flags.epochs * epoch_steps, flags.max_steps or sys.maxsize)
    plan = Plan(epoch_steps, total_steps)
    done, meters = Progress(flags.start_epoch, flags.start_epoch * epoch_steps), Meters()
    if saved:
        data = {"spec": asdict(spec), "pictures": count_pictures(train_loader, test_loader)}
        places = model, optimizer, compute
        done, meters = restore(saved, *places, file=flags.resume, **data, **asdict(plan))
        train_loader.skipped.update(saved.get("skipped", ()))
    if done.step >= total_steps and not saved:
        raise run.RunError(
            f"--start-epoch {flags.start_epoch}: its {done.step} steps are not before the end, "
            f"--max-steps {flags.max_steps}"
        )
    if done.step >= total_steps:
        say(f"{flags.resume or name} is finished: {done.step} steps of {total_steps} asked for")
        return
    scheduler = choose_schedule(flags, optimizer, plan, done.step + meters.steps)
    recorder = open_recorder(session, run_dir, name, kind, model, done, meters, plan)
    ended = run.tell_where_to_continue(recorder.run_dir, name_pictures(flags))
    with ended, closing(recorder), heed_signals() as wish:
        seed_process(session)
        Epochs(
            vars(flags),
            spec,
            world,
            compute,
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
            test_batches=world.deal(limit),
            save_every=flags.checkpoint_steps,
            wish=wish,
            ways=ways,
            own_buffers=saved.get("own_buffers", ()) if saved else (),
        ).run()


def test(
    session: Session,
    spec: DataSpec,
    model: nn.Module,
    loader: PictureLoader,
    *,
    limit: int = sys.maxsize,
    ways: Ways = Ways(),  # noqa: B008 - frozen
) -> None:
    """Say how good a finished network is, that of the checkpoint if there is one; keep nothing.

    Args:
        limit, ways: as of `fit`.
    """
    flags, world = session.flags, session.world
    compute = choose_compute(session)
    compute.place(model)
    if session.saved:
        restore_model(session.saved, model, file=flags.resume, spec=asdict(spec))
    criterion = build_criterion(flags.loss, spec.num_classes)
    network = compute.translate(ways.settle(model.eval()))
    steps = world.deal(limit)
    figures = evaluate(network, loader, criterion, compute=compute, world=world, max_steps=steps)
    for name in list_skipped(world, loader):
        say(f"left out: {name} cannot be decoded")
    say(
        f"{flags.arch}  test loss {figures['loss']:.4f} top1 {figures['top1']:.2f}%"
        f" top5 {figures['top5']:.2f}%  {figures['images']} pictures  {figures['seconds']:.1f} s"
    )


def open_recorder(
    session: Session,
    run_dir: Path | None,
    name: str,
    kind: str,
    model: nn.Module,
    done: Progress,
    meters: Meters,
    plan: Plan,
) -> Recorder | NullRecorder:
    """What keeps the run, in the first process; in the others what keeps nothing."""
    if not session.world.is_first:
        return NullRecorder()
    facts = describe_run(session.flags, kind, model) | {"epoch_steps": plan.epoch_steps}
    return Recorder(
        session.flags,
        session.saved,
        run_dir,
        name,
        facts,
        model=model,
        done=done,
        meters=meters,
        device=session.device,
        processes=session.world.size,
        epochs=plan.epochs,
    )


def seed_process(session: Session) -> None:
    """Random numbers of its own for each process, as dropout wants them.

    A continued run goes on with those of before, if it has as many processes.
    """
    saved, world = session.saved, session.world
    if saved and len(saved["rng"]) == world.size:
        set_rng_state(saved["rng"][world.rank])
    else:
        run.seed_everything(session.flags.seed + world.rank)


def choose_compute(session: Session) -> Compute:
    flags, world = session.flags, session.world
    return Compute(
        session.device,
        amp=flags.amp,
        channels_last=flags.channels_last,
        compiled=flags.compile,
        replays=run.choose_graphs(flags.cuda_graphs, session.device, world.size, flags.compile),
    )


def choose_optimizer(flags: Namespace, model: nn.Module) -> Optimizer:
    return build_optimizer(
        flags.optimizer,
        model.parameters(),
        lr=flags.lr,
        momentum=flags.momentum,
        weight_decay=flags.weight_decay,
    )


def name_pictures(flags: Namespace) -> str:
    """The words of the command line that tell where the pictures are: --data DIR, or DIR alone."""
    if getattr(flags, "dataset", None) == "digits":  # embedded: refuses --data
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
