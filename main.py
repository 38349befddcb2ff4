"""Train an image classifier, with BatchNorm or with deconvolution: `python main.py --help`."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from models import ARCHITECTURES, build_model, describe_architectures, make_layers
from util import args, run
from util.checkpoint import CheckpointError, rng_state, save_checkpoint, set_rng_state
from util.data import DATASETS, DataError, DataSpec, build_loaders
from util.engine import TrainingDiverged, evaluate, train_one_epoch
from util.logger import RunLogger
from util.metrics import peak_memory_mb
from util.optim import build_criterion, build_optimizer, build_scheduler
from util.parser import Parser
from util.progress import Progress, restore, snapshot
from util.report import report_batch, report_epoch
from util.settings import PRESETS, read_settings


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says. Exit codes: 2 bad input, 1 diverged, 130 interrupted."""
    parser = build_parser()
    options = {name: architecture.options for name, architecture in ARCHITECTURES.items()}
    try:
        train(*read_settings(parser, options, argv))
    except (run.RunError, DataError, CheckpointError) as error:
        parser.error(str(error))
    except OSError as error:
        if error.strerror is None:  # not of the file system
            raise
        parser.error(": ".join(str(part) for part in (error.filename, error.strerror) if part))
    except TrainingDiverged as error:
        parser.exit(1, f"{parser.prog}: error: training diverged at {error}; try a lower --lr\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


def train(flags: Namespace, saved: dict[str, Any] | None = None) -> None:
    """flags -> data -> layers -> model -> epochs; `saved` is the checkpoint to continue."""
    device = run.choose_device(flags.use_gpu, flags.threads)
    run_dir = run.find_run_dir(flags.run_dir, flags.resume)
    spec, train_loader, test_loader = load_pictures(flags, device)
    run.seed_everything(flags.seed)
    model = build_network(flags, spec).to(device)
    run.check_last_batch(model, len(train_loader.dataset), flags.batch_size)
    criterion = build_criterion(flags.loss, spec.num_classes)
    optimizer = choose_optimizer(flags, model)
    epoch_steps = len(train_loader)
    total_steps = min(flags.epochs * epoch_steps, flags.max_steps or sys.maxsize)
    epochs = math.ceil(total_steps / epoch_steps)
    done = Progress()
    if saved:
        done = restore(
            saved,
            model,
            optimizer,
            spec=asdict(spec),
            epoch_steps=epoch_steps,
            total_steps=total_steps,
        )
    if done.step >= total_steps:
        print(f"{flags.resume} is finished: {done.step} steps of {total_steps} asked for")
        return
    scheduler = choose_schedule(flags, optimizer, total_steps, epoch_steps, done.step)
    facts = describe_run(flags, model) | {"device": run.describe_device(device)}
    name = f"{flags.dataset}-{flags.arch}-{facts['kind']}"
    run_dir = run.open_run_dir(run_dir, flags.out, name)
    run.write_record(run_dir, vars(flags), device)
    run.carry_over(flags.resume, saved and saved["progress"], run_dir)
    print(f"{name}, {facts['parameters']:,} parameters, {facts['device']}, in {run_dir}")
    logger = open_logger(flags, run_dir, saved)
    with closing(logger), run.tell_where_to_continue(run_dir):
        if saved:
            set_rng_state(saved["rng"])
        while done.step < total_steps:
            epoch = done.epoch + 1
            train_loader.sampler.set_epoch(epoch)
            trained = train_one_epoch(
                model,
                train_loader,
                criterion,
                optimizer,
                scheduler,
                device=device,
                max_steps=total_steps - done.step,
                on_batch=partial(report_batch, logger, done, flags.print_freq, flags.msg),
                report_every=1 if flags.msg else flags.print_freq,
                title=f"epoch {epoch}/{epochs}",
            )
            tested = evaluate(model, test_loader, criterion, device=device)
            done.finish_epoch(trained, tested)
            report_epoch(logger, epoch, epochs, trained, tested, model)
            state = {
                **snapshot(done, model, optimizer),
                "config": vars(flags),
                "spec": asdict(spec),
                "rng": rng_state(),
                "history": logger.history,
            }
            save_checkpoint(state, run_dir, is_best=done.is_best)
            if flags.checkpoint_epoch and epoch % flags.checkpoint_epoch == 0:
                save_checkpoint(state, run_dir, filename=f"checkpoint_{epoch}.pth.tar")
            logger.summary({**facts, **done.summary(), "peak_memory_mb": peak_memory_mb(device)})


def build_parser() -> Parser:
    """The command line of this script."""
    parser = Parser("main.py", "Train an image classifier, with BatchNorm or with deconvolution.")
    args.add_network_flags(parser, ARCHITECTURES, describe_architectures)
    args.add_deconv_flags(parser)
    args.add_data_flags(parser, DATASETS)
    args.add_training_flags(parser, PRESETS)
    args.add_output_flags(parser)
    return parser


def load_pictures(
    flags: Namespace, device: torch.device
) -> tuple[DataSpec, DataLoader, DataLoader]:
    return build_loaders(
        flags.dataset,
        flags.data,
        batch_size=flags.batch_size,
        num_workers=flags.num_workers,
        seed=flags.seed,
        image_size=flags.image_size,
        cache_dir=Path(flags.out).expanduser(),
        device_type=device.type,
    )


def build_network(flags: Namespace, spec: DataSpec) -> nn.Module:
    """Layers as the flags want them, and the network made of them."""
    options = {"layout": flags.layout, "shared": flags.share_blocks}
    layers = make_layers(
        deconv=flags.deconv,
        mode=flags.mode,
        block=flags.num_groups,
        block_final=flags.num_groups_final,
        eps=flags.eps,
        n_iter=flags.deconv_iter,
        stem_iter=flags.stem_iter,
        bias=flags.bias,
        sampling_stride=flags.stride,
        batchnorm=flags.batchnorm,
        **{name: value for name, value in options.items() if value is not None},
    )
    return build_model(
        flags.arch,
        layers,
        in_channels=spec.in_channels,
        num_classes=spec.num_classes,
        image_size=spec.image_size,
        method=flags.method,
        dropout_rate=flags.dropout_rate,
    )


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
        start_step=start_step,
    )


def open_logger(flags: Namespace, run_dir: Path, saved: dict[str, Any] | None) -> RunLogger:
    return RunLogger(
        run_dir,
        tensorboard=flags.tensorboardX,
        plot=flags.save_plot,
        history=saved["history"] if saved else None,
    )


def describe_run(flags: Namespace, model: nn.Module) -> dict[str, Any]:
    """What summary.json says beside the figures; `kind` is short for the layers."""
    names = ("arch", "dataset", "seed", "batch_size", "optimizer", "lr", "weight_decay")
    kind = f"deconv-mode{flags.mode}" if flags.deconv else "bn" if flags.batchnorm else "plain"
    return {
        "kind": kind if flags.method is None else f"method{flags.method}",
        **{name: getattr(flags, name) for name in names},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


if __name__ == "__main__":
    main()
