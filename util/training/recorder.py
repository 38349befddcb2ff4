"""What a run keeps: its folder with record, logs and checkpoints, and the lines on the console."""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.checkpoint.store import save_checkpoint
from util.console import print_line
from util.device import describe_device
from util.errors import RunError
from util.files import atomic_write, describe_fault
from util.tracking.logger import RunLogger
from util.tracking.provenance import write_record
from util.tracking.run_dir import check_unchanged, copy_previous_run, open_run_dir
from util.training.metrics import EpochMetrics, Metrics, peak_memory_mb
from util.training.report import report_batch, report_epoch
from util.training.resume import Progress

SKIPPED_NAME = "skipped.txt"
DIVERGED_NAME = "diverged.json"


class Recorder:
    """Keeps everything about a run that is under way; the first process has one.

    Args:
        flags: all settings, for the record.
        saved: the checkpoint that is continued, None for a fresh start.
        run_dir: the folder; None: a new one, `name`/<time> in the folder of --out.
        name: of the run.
        facts: what summary.json says beside the figures.
        model: whose first filters are drawn.
        done, meters: how far the run has come, and its epoch under way; the caller counts on.
        device, processes: what the run computes on, all in all.
        epochs: of the whole run.
    """

    def __init__(
        self,
        flags: Namespace,
        saved: dict[str, Any] | None,
        run_dir: Path | None,
        name: str,
        facts: dict[str, Any],
        *,
        model: nn.Module,
        done: Progress,
        meters: EpochMetrics,
        device: torch.device,
        processes: int,
        epochs: int,
    ) -> None:
        self.flags, self.model, self.done = flags, model, done
        self._told: set[str] = set()
        self.device, self.epochs = device, epochs
        self.facts = facts | {"device": describe_device(device), "processes": processes}
        self.run_dir, self._lock = open_run_dir(run_dir, flags.out, name)
        check_unchanged(self.run_dir, flags.resume, saved)
        write_record(self.run_dir, vars(flags), device, processes)
        copy_previous_run(flags.resume, saved, self.run_dir)
        print_line(
            f"{name}, {facts['parameters']:,} parameters, {self.facts['device']}"
            f"{f' in {processes} processes' if processes > 1 else ''}, in {self.run_dir}"
        )
        self.logger = RunLogger(
            self.run_dir,
            tensorboard=flags.tensorboardX,
            plot=flags.save_plot,
            history=saved["history"] if saved else None,
            start_epoch=done.epoch,
            start_step=done.step,
            batches=meters.steps,
            epoch_steps=facts["epoch_steps"],
        )

    def batch(self, batch: int, now: Metrics) -> None:
        """Called with the figures of every batch."""
        with self._not_for_a_full_disk():
            report_batch(self.logger, self.done, self.flags.print_freq, self.flags.msg, batch, now)

    def checkpoint(self, state: dict[str, Any], *, last: bool = False) -> None:
        """Called where a run may have to be taken up in the middle of an epoch.

        Args:
            last: the run ends here, see `_rescued`.
        """
        self._save(state, last=last)

    def epoch(
        self, trained: Metrics, tested: Metrics, state: dict[str, Any], *, last: bool
    ) -> None:
        """Called at the end of every epoch, the `last` included: logs, summary, the checkpoint."""
        epoch, every = self.done.epoch, self.flags.checkpoint_epoch
        with self._not_for_a_full_disk():
            report_epoch(self.logger, epoch, self.epochs, trained, tested, self.model)
            memory = {"peak_memory_mb": peak_memory_mb(self.device)}
            self.logger.summary({**self.facts, **self.done.summary(), **memory})
        if every and epoch % every == 0:
            self._save(state, last=False, filename=f"checkpoint_{epoch}.pth.tar")
        self._save(state, last=last, is_best=self.done.is_best)

    def layers(
        self, judge: Callable[[torch.Tensor], Mapping[str, float]], *images: torch.Tensor
    ) -> None:
        """Called after `epoch`, with a batch that was tested: figures about layers, if wanted."""
        with self._not_for_a_full_disk():
            for batch in images if self.flags.tensorboardX else ():
                self.logger.layers(judge(batch))

    def diverged(self, report: dict[str, Any]) -> None:
        """Called when training ends for numbers that are not finite: keeps what is known of it."""
        with self._not_for_a_full_disk(), atomic_write(self.run_dir / DIVERGED_NAME) as file:
            file.write(json.dumps(report).encode() + b"\n")

    def skipped(self, names: list[str]) -> None:
        """Called with all the bad files left out so far: lists them in skipped.txt."""
        if not names:
            return
        path = self.run_dir / SKIPPED_NAME
        with self._not_for_a_full_disk(), atomic_write(path) as file:
            lines = "".join(name.replace("\n", "\\n") + "\n" for name in names)
            file.write(lines.encode(errors="surrogateescape"))
        print_line(f"{len(names)} bad images left out, listed in {path}")

    def close(self) -> None:
        with self._not_for_a_full_disk():
            self.logger.close()
        self._lock.close()

    def _save(self, state: dict[str, Any], *, last: bool, **options: Any) -> None:
        state = {**state, "history": self.logger.history}
        with self._rescued(state) if last else self._not_for_a_full_disk():
            save_checkpoint(state, self.run_dir, **options)

    @contextmanager
    def _not_for_a_full_disk(self) -> Iterator[None]:
        """No row, image or checkpoint is worth the run: say what is not written, and go on."""
        try:
            yield
        except OSError as error:
            fault = describe_fault(error)
            if fault not in self._told:
                print_line(f"warning: {fault}; training goes on")
            self._told.add(fault)

    @contextmanager
    def _rescued(self, state: dict[str, Any]) -> Iterator[None]:
        """Where the last checkpoint cannot be written, it goes to the folder for temporary files.

        Raises:
            RunError: naming what failed, and where the checkpoint is instead.
        """
        try:
            yield
        except OSError as error:
            folder = tempfile.mkdtemp(prefix=f"{self.run_dir.name}-")
            path = save_checkpoint(state, folder)
            raise RunError(f"{describe_fault(error)}; what was trained is in {path}") from error


class NullRecorder:
    """Keeps nothing: what all processes but the first have."""

    run_dir = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None
