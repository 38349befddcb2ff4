"""Writer of a run's record: folder, logs, checkpoints, and the lines on the console."""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from util.checkpoint.schema import EMA_VALUES
from util.checkpoint.store import BEST_NAME, save_checkpoint
from util.console import print_line, shows_bars
from util.device import describe_device
from util.errors import RunError
from util.files import atomic_write, describe_fault
from util.tracking.logger import RunLogger
from util.tracking.provenance import write_record
from util.tracking.run_dir import check_unchanged, copy_previous_run, open_run_dir
from util.training.metrics import Metrics, average_rows, peak_memory_mb
from util.training.optim import milestone_steps
from util.training.resume import Plan, TrainingState

SKIPPED_NAME = "skipped.txt"
DIVERGED_NAME = "diverged.json"
# Flags that summary.json holds beside the metrics.
SETTINGS = ("arch", "dataset", "seed", "batch_size", "optimizer", "lr", "weight_decay", "amp")
# Flags that TensorBoard leaves out.
PLACES = ("config", "resume", "run_dir", "out")


class Recorder:
    """Record of a run under way, kept by rank 0, of the `state` that the caller updates.

    `run_dir` is the folder; None makes a new `<dataset>-<arch>-<kind>/<time>` below --out. `saved`
    is the checkpoint that the run continues.
    """

    def __init__(
        self,
        flags: Namespace,
        saved: dict[str, Any] | None,
        run_dir: Path | None,
        state: TrainingState,
        plan: Plan,
    ) -> None:
        self.flags, self.state, self.plan = flags, state, plan
        self._warnings: set[str] = set()
        device, ranks, kind = state.accelerator.device, state.world.size, _describe_layers(flags)
        self._constants = {
            "kind": kind,
            **{name: getattr(flags, name) for name in SETTINGS if hasattr(flags, name)},
            "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
            "epoch_steps": plan.epoch_steps,
            "device": describe_device(device),
            "processes": ranks,
        }
        name = f"{getattr(flags, 'dataset', 'imagenet')}-{flags.arch.replace('/', '-')}-{kind}"
        self.run_dir, self._lock = open_run_dir(run_dir, flags.out, name)
        check_unchanged(self.run_dir, flags.resume, saved)
        write_record(self.run_dir, vars(flags), device, ranks)
        copy_previous_run(flags.resume, saved, self.run_dir)
        print_line(
            f"{name}, {self._constants['parameters']:,} parameters, {self._constants['device']}"
            f"{f' in {ranks} processes' if ranks > 1 else ''}, in {self.run_dir}"
        )
        print_line(
            f"{_describe_images(state)}, "
            f"{flags.optimizer} with lr {flags.lr:g}, {_describe_schedule(flags, plan)}"
        )
        validates = len(state.loaders) > 2
        if not validates:
            print_line(
                f"{BEST_NAME} is chosen on the test images; --val-split 0.1 chooses it on training "
                "images that are held out"
            )
        self.logger = RunLogger(
            self.run_dir,
            tensorboard=flags.tensorboardX,
            flags={name: value for name, value in vars(flags).items() if name not in PLACES},
            plot=flags.save_plot,
            history=saved["history"] if saved else None,
            start_epoch=state.progress.epoch,
            start_step=state.progress.step,
            test_columns=EMA_VALUES if state.average else (),
            batches=state.metrics.steps,
            epoch_steps=plan.epoch_steps,
            validates=validates,
        )

    def batch(self, batch: int, metrics: Metrics) -> None:
        """Log a training step of the epoch under way.

        The log gets a row every --print-freq steps of the run: the mean over these steps, as far as
        they belong to the epoch. The console gets the same mean as a line where no progress bar is
        shown. With --msg it gets a line for every step instead.
        """
        epoch, step = self.state.progress.epoch + 1, self.state.progress.step + batch
        every = self.flags.print_freq
        is_due = step % every == 0
        mean = average_rows(self.state.metrics.rows[-every:]) if is_due else {}
        shown = metrics if self.flags.msg else {**metrics, **mean}
        with self._warn_on_full_disk():
            if self.flags.msg or (is_due and not shows_bars()):
                print_line(
                    f"epoch {epoch} batch {batch}  loss {shown['loss']:.4f}"
                    f"  top1 {shown['top1']:.2f}%  lr {shown['lr']:.3g}"
                )
            if is_due:
                self.logger.batch(epoch, step, {**metrics, **mean})

    def epoch(self, train: Metrics, test: Metrics, val: Metrics | None = None) -> None:
        """Log the metrics of a finished epoch and update summary.json."""
        progress = self.state.progress
        average = f" average top1 {test['ema_top1']:.2f}%" if "ema_top1" in test else ""
        with self._warn_on_full_disk():
            self.logger.epoch(progress.epoch, train, test, val)
            self.logger.filters(*_first_filters(self.state.model))
            seconds = train["seconds"] + test["seconds"] + (val["seconds"] if val else 0)
            held_out = f"  val loss {val['loss']:.4f} top1 {val['top1']:5.2f}%" if val else ""
            print_line(
                f"epoch {progress.epoch:{len(str(self.plan.epochs))}}/{self.plan.epochs}"
                f"  train loss {train['loss']:.4f} top1 {train['top1']:5.2f}%"
                f"{held_out}"
                f"  test loss {test['loss']:.4f} top1 {test['top1']:5.2f}% top5 {test['top5']:.2f}%"
                f"{average}  last lr {train['lr']:.2g}  {seconds:.1f} s"
            )
            memory = peak_memory_mb(self.state.accelerator.device)
            metrics = {**progress.summary(), **self._best_metrics(), "peak_memory_mb": memory}
            self.logger.summary({**self._constants, **metrics})

    def checkpoint(self, saved: dict[str, Any], *, last: bool = False) -> None:
        """Save a checkpoint, at the end of an epoch also as the best or a numbered one.

        Args:
            saved: result of `TrainingState.capture`; the logger adds the history.
            last: True if the run ends here.

        Raises:
            RunError: the last checkpoint went to the temporary folder; names fault and file.
        """
        saved = {**saved, "history": self.logger.history}
        progress = self.state.progress
        ends_epoch = saved["step"] == progress.step
        if ends_epoch:
            with self._warn_on_full_disk():
                self._save_numbered(saved, progress.epoch)
        try:
            save_checkpoint(saved, self.run_dir, is_best=ends_epoch and progress.is_best)
        except OSError as error:
            if last:
                path = save_checkpoint(saved, tempfile.mkdtemp(prefix=f"{self.run_dir.name}-"))
                fault = describe_fault(error)
                raise RunError(f"{fault}; the last checkpoint was saved to {path}") from error
            self._warn(error)

    def _save_numbered(self, saved: dict[str, Any], epoch: int) -> None:
        """Save checkpoint_<epoch>.pth.tar if a flag asks for it, and then delete an old one."""
        every, hist = self.flags.checkpoint_epoch, self.flags.checkpoint_hist
        old = epoch - hist
        if hist > 1 or (every and epoch % every == 0):
            save_checkpoint(saved, self.run_dir, filename=f"checkpoint_{epoch}.pth.tar")
        if hist > 1 and not (every and old % every == 0):
            (self.run_dir / f"checkpoint_{old}.pth.tar").unlink(missing_ok=True)

    def layers(self, diagnose: Callable[[Tensor], Mapping[str, float]], *images: Tensor) -> None:
        """Log diagnostics of the layers on a batch `images` after `epoch`, with --tensorboardX."""
        for batch in images if self.flags.tensorboardX else ():
            try:
                scalars = diagnose(batch)
            except Exception as error:  # a diagnostic never ends a training
                self._warn_once(f"no metrics of layers, {type(error).__name__}: {error}")
            else:
                with self._warn_on_full_disk():
                    self.logger.layers(scalars)

    def diverged(self, report: dict[str, Any]) -> None:
        """Write `report` on numbers that are not finite to diverged.json."""
        with self._warn_on_full_disk(), atomic_write(self.run_dir / DIVERGED_NAME) as file:
            file.write(json.dumps(report).encode() + b"\n")

    def skipped(self, names: list[str]) -> None:
        """List all bad images skipped so far in skipped.txt."""
        if not names:
            return
        path = self.run_dir / SKIPPED_NAME
        with self._warn_on_full_disk(), atomic_write(path) as file:
            lines = "".join(name.replace("\n", "\\n") + "\n" for name in names)
            file.write(lines.encode(errors="surrogateescape"))
        print_line(f"skipped {len(names)} bad images, listed in {path}")

    def finished(self) -> None:
        """Print the result of the whole run and its folder."""
        with self._warn_on_full_disk():
            self.logger.finished()
        progress = self.state.progress
        best = "no epoch had a finite test loss"
        if progress.best_epoch:
            name = "average" if self.state.average else "test"
            best = f"best {name} top1 {progress.best_top1:.2f}%"
            metrics = self._best_metrics()
            if "best_val_top1" in metrics:
                best = f"best validation top1 {progress.best_top1:.2f}%"
                best += f", {name} top1 {metrics['best_test_top1']:.2f}%"
            best += f" in epoch {progress.best_epoch}"
        seconds = progress.train_seconds + progress.test_seconds
        print_line(f"finished {progress.step} steps in {seconds:.1f} s, {best}: {self.run_dir}")

    def _best_metrics(self) -> dict[str, float]:
        """Return the accuracies of the best epoch, in the test and of the metric that chose it."""
        progress = self.state.progress
        if "val_top1" not in self.logger.history:
            return {"best_test_top1": progress.best_top1}
        tests = {"best_test_top1": progress.best_test_top1}
        return {"best_val_top1": progress.best_top1, **tests}

    def close(self) -> None:
        """Close the logs and release the folder."""
        with self._warn_on_full_disk():
            self.logger.close()
        self._lock.close()

    @contextmanager
    def _warn_on_full_disk(self) -> Iterator[None]:
        """Turn an OSError into a warning: no file is worth the run."""
        try:
            yield
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        self._warn_once(describe_fault(error))

    def _warn_once(self, fault: str) -> None:
        """Print a warning, once per fault."""
        if fault not in self._warnings:
            print_line(f"warning: {fault}; training goes on")
        self._warnings.add(fault)


class NullRecorder:
    """Recorder of the ranks above 0: every method does nothing."""

    run_dir = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _describe_layers(flags: Namespace) -> str:
    """Return a word for the model's layers: method2, deconv-mode5, bn or plain."""
    if getattr(flags, "method", None) is not None:
        return f"method{flags.method}"
    return f"deconv-mode{flags.mode}" if flags.deconv else "bn" if flags.batchnorm else "plain"


def _describe_images(state: TrainingState) -> str:
    """Return the numbers of images and of classes in a few words."""
    train, test, *validation = (f"{len(loader.dataset):,}" for loader in state.loaders)
    train += f" training, {validation[0]} validation" if validation else " training"
    return f"{train} and {test} test images of {state.spec.num_classes:,} classes"


def _describe_schedule(flags: Namespace, plan: Plan) -> str:
    """Return the course of the learning rate in a few words."""
    drop = f"times {flags.multistep_gamma:g}"
    if flags.lr_scheduler in ("cosine", "linear"):
        course = f"{flags.lr_scheduler} to 0 at step {plan.total_steps}"
    elif flags.lr_scheduler == "multistep":
        drops = milestone_steps(flags.milestone, plan.total_steps, plan.epoch_steps)
        course = f"{drop} at step {' and '.join(map(str, drops))}"
    else:
        course = f"{drop} every {flags.scheduler_step_size} epochs"
    return f"{course}, {flags.warmup_epochs:g} epochs of warmup" if flags.warmup_epochs else course


def _first_filters(model: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return the first convolution's kernels: as stored, and with whitening if it whitens."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            whitened = module.whitened_weight() if hasattr(module, "whitened_weight") else None
            return module.weight.detach(), whitened
    return None, None
