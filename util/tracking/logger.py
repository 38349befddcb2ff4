"""Logs of a run: tab-separated tables, TensorBoard events, training curves and a summary."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from util.checkpoint.schema import VALUES
from util.console import visible
from util.files import atomic_write
from util.tracking.tensorboard import Events, open_flags

EPOCH_COLUMNS = ("epoch", *VALUES)
BATCH_COLUMNS = ("epoch", "batch", *VALUES)
BATCH_LOG_NAME = "train_batch.log"
PLOT_NAME = "TrainingPlots.png"


class RunLogger:
    """Writes `train.log`, `test.log`, `train_batch.log`, TensorBoard events, `TrainingPlots.png`.

    A run with validation images also has a `val.log`.

    Logs are tab-separated with a header row. Every row is flushed before the call returns.
    Accuracy is in percent, time in seconds. `train.log` and `test.log` give the seconds of each
    epoch, `train_batch.log` the seconds since the epoch began. TensorBoard places every event at
    its optimizer step.

    Args:
        run_dir: folder of the run; created if missing.
        tensorboard: write event files.
        flags: settings that TensorBoard shows beside the final metrics.
        plot: draw the curves after each epoch.
        history: `history` of the checkpoint to continue. Later rows and events are cut, as if the
            run had never been interrupted. None starts all files afresh.
        start_epoch, start_step: epochs and optimizer steps that count as finished before the first
            row, without a history.
        test_columns: more metrics of each test and validation.
        batches: steps of the epoch under way; their rows and events stay.
        epoch_steps: optimizer steps of a whole epoch, for the axis of epochs; 0: unknown.
        validates: True for a run with validation images.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        tensorboard: bool,
        plot: bool,
        flags: Mapping[str, Any] | None = None,
        history: dict[str, list] | None = None,
        start_epoch: int = 0,
        start_step: int = 0,
        test_columns: Sequence[str] = (),
        batches: int = 0,
        epoch_steps: int = 0,
        validates: bool = False,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._batch_path = self.run_dir / BATCH_LOG_NAME
        self._plot, self._start_step, self._epoch_steps = plot, start_step, epoch_steps
        parts = ("train", "val", "test") if validates else ("train", "test")
        if not validates:  # an earlier run in this folder may have validated
            (self.run_dir / "val.log").unlink(missing_ok=True)
        self._values = {
            part: VALUES if part == "train" else (*VALUES, *test_columns) for part in parts
        }
        names = [f"{part}_{key}" for part, values in self._values.items() for key in values]
        self.history = {
            key: list(history[key]) if history else [] for key in ("epoch", "step", *names)
        }
        self._logs = {
            part: _open_log(
                self.run_dir / f"{part}.log", ("epoch", *values), self._epoch_rows(part)
            )
            for part, values in self._values.items()
        }
        last = self.history["epoch"][-1] if self.history["epoch"] else start_epoch
        rows = _read_complete_rows(self._batch_path) if self.history["epoch"] or batches else []
        kept = [row for row in rows if row[0] <= last or (row[0] == last + 1 and row[1] <= batches)]
        self._batch_log = _open_log(self._batch_path, BATCH_COLUMNS, kept)
        first = self._finished_steps + batches + 1 if history else 0
        self._events = Events(self.run_dir, first) if tensorboard else None
        self._flags = open_flags(self.run_dir, flags or {}) if tensorboard else None

    def batch(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Add a row with the VALUES of a step to `train_batch.log`.

        `step` counts the optimizer steps of the run; the column `batch` counts those of the epoch.
        """
        row = (epoch, step - self._finished_steps, *(values[key] for key in VALUES))
        self._batch_log.write(_format_row(row) + "\n")
        scalars = {f"train/batch_{key}": values[key] for key in ("loss", "top1")}
        self._scalars({**scalars, "lr": values["lr"]}, step)

    def epoch(
        self,
        epoch: int,
        train: dict[str, Any],
        test: dict[str, Any],
        val: dict[str, Any] | None = None,
    ) -> None:
        """Add a row to `train.log`, to `test.log` and to `val.log`, and draw the curves so far.

        `train` holds VALUES and the numbers of images and of optimizer steps. `test`, and `val` of
        a run with validation images, hold VALUES without lr and `test_columns`.
        """
        step = self._finished_steps + int(train["steps"])
        parts = {"train": train, "test": {**test, "lr": train["lr"]}}
        parts |= {"val": {**val, "lr": train["lr"]}} if val else {}
        self.history["epoch"].append(epoch)
        self.history["step"].append(step)
        for part, values in parts.items():  # before a full disk can refuse a row
            for key in self._values[part]:
                self.history[f"{part}_{key}"].append(float(values[key]))
        for part, values in parts.items():
            self._logs[part].write(_format_row(self._epoch_rows(part)[-1]) + "\n")
            keys = (key for key in self._values[part] if key not in ("lr", "seconds"))
            scalars = {f"{part}/{key}": values[key] for key in keys}
            self._scalars(scalars, step)
        self._scalars({"time/images_per_second": train["images"] / train["seconds"]}, step)
        if self._plot:
            self._plot_curves()

    def _plot_curves(self) -> None:
        from util.tracking.plots import RunCurves, plot_training

        parts = {
            part: {key: self.history[f"{part}_{key}"] for key in VALUES} for part in self._values
        }
        batches = _to_columns(BATCH_COLUMNS, _read_complete_rows(self._batch_path))
        ends = self.history["step"]
        curves = RunCurves(batches=batches, ends=ends, epoch_steps=self._epoch_steps, **parts)
        title = visible("/".join(self.run_dir.resolve().parts[-2:]))
        plot_training(curves, self.run_dir / PLOT_NAME, title=title)
        gc.collect()  # a figure refers to itself: without a collection its pixels stay

    def filters(self, raw: Tensor | None, whitened: Tensor | None) -> None:
        """Add TensorBoard images of the first layer's filters (O C h w), at the last epoch."""
        if not self._events:
            return
        from util.tracking.plots import draw_filters

        for tag, weight in (("first_layer", raw), ("first_layer_whitened", whitened)):
            if weight is not None:
                self._events.image(f"weights/{tag}", draw_filters(weight), self._finished_steps)

    def layers(self, scalars: Mapping[str, float]) -> None:
        """Log scalars about layers by tag, at the last epoch."""
        self._scalars(scalars, self._finished_steps)

    def _scalars(self, scalars: Mapping[str, float], step: int) -> None:
        for tag, value in scalars.items() if self._events else ():
            self._events.scalar(tag, value, step)

    def summary(self, values: dict[str, Any]) -> None:
        """Write `summary.json`; NaN and infinity, which JSON lacks, become null."""
        finite = json.loads(json.dumps(values), parse_constant=lambda name: None)
        with atomic_write(self.run_dir / "summary.json") as file:
            file.write(json.dumps(finite, indent=2).encode() + b"\n")

    def finished(self) -> None:
        """Mark the run as finished in TensorBoard."""
        if self._flags:
            self._flags.finished()

    def close(self) -> None:
        """Close all files."""
        files = (*self._logs.values(), self._batch_log, self._events, self._flags)
        for file in filter(None, files):
            file.close()

    @property
    def _finished_steps(self) -> int:
        """Count the optimizer steps of the epochs logged so far."""
        return self.history["step"][-1] if self.history["step"] else self._start_step

    def _epoch_rows(self, part: str) -> list[Sequence[float]]:
        columns = ("epoch", *(f"{part}_{key}" for key in self._values[part]))
        return list(zip(*(self.history[column] for column in columns), strict=True))


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file holds no JSON object; the message names it.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def read_log(path: str | Path) -> dict[str, list[float]]:
    """Return the columns of a log by name; `epoch` and `batch` are integers.

    Raises:
        ValueError: a line is not a row of numbers; the message names file and line.
    """
    header, *lines = Path(path).read_text(encoding="utf-8").splitlines() or [""]
    columns, rows = header.split("\t"), []
    for number, line in enumerate(lines, start=2):
        try:
            rows.append(_parse_row(line, columns))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return _to_columns(columns, rows)


def _to_columns(columns: Sequence[str], rows: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    return {column: [row[index] for row in rows] for index, column in enumerate(columns)}


def _parse_row(line: str, columns: Sequence[str]) -> list[float]:
    cells = line.split("\t")
    if len(cells) != len(columns):
        raise ValueError(f"{len(cells)} values for the {len(columns)} columns {' '.join(columns)}")
    pairs = zip(columns, cells, strict=True)
    return [int(cell) if column in ("epoch", "batch") else float(cell) for column, cell in pairs]


def _read_complete_rows(path: Path) -> list[list[float]]:
    """Return the rows of `train_batch.log`, up to a line that a crash left incomplete."""
    rows: list[list[float]] = []
    if path.is_file():  # a pipe would block
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        with suppress(ValueError):
            for line in lines[1:-1]:  # without the header and what follows the last line end
                rows.append(_parse_row(line, BATCH_COLUMNS))
    return rows


def _open_log(path: Path, columns: Sequence[str], rows: Iterable[Sequence[float]]) -> TextIO:
    """Write a log with the header and `rows`, and open it for appending line by line."""
    lines = ["\t".join(columns), *map(_format_row, rows)]
    with atomic_write(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    return open(path, "a", buffering=1, encoding="utf-8", newline="\n")  # 1: flush every line


def _format_row(values: Sequence[float]) -> str:
    return "\t".join(str(v) if isinstance(v, int) else f"{float(v):.6g}" for v in values)
