"""What a run leaves behind while it trains: logs, TensorBoard events, curves, a summary."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from util.checkpoint.schema import HISTORY, VALUES
from util.console import visible
from util.files import atomic_write
from util.tracking.plots import draw_filters, plot_training
from util.tracking.tensorboard import Events, NullEvents

EPOCH_COLUMNS = ("epoch", *VALUES)
BATCH_COLUMNS = ("epoch", "batch", *VALUES)
BATCH_LOG_NAME = "train_batch.log"
PLOT_NAME = "TrainingPlots.png"


class RunLogger:
    """Writes `train.log`, `test.log`, `train_batch.log`, TensorBoard events, `TrainingPlots.png`.

    Logs are tab separated with a header row, and each row is on its way to the disk when the call
    returns. Accuracy is in percent, time in seconds; `train.log` and `test.log` tell the seconds of
    each epoch, `train_batch.log` the seconds of training since the epoch began. NaN and infinity
    are written as such. In TensorBoard everything is placed at the number of optimizer steps.

    Args:
        run_dir: the folder, made if need be.
        tensorboard: write event files.
        plot: draw the curves after each epoch.
        history: `history` of the checkpoint to continue; later rows and events are cut, so that
            the files become those of a run never interrupted. None starts all files afresh.
        start_epoch, start_step: epochs, and optimizer steps, that count as done before the first
            row, where there is no history of finished epochs.
        batches: steps done since, of an epoch under way; their rows and events stay, too.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        tensorboard: bool,
        plot: bool,
        history: dict[str, list] | None = None,
        start_epoch: int = 0,
        start_step: int = 0,
        batches: int = 0,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._plot, self._start_epoch, self._start_step = plot, start_epoch, start_step
        self.history = {key: list(history[key]) if history else [] for key in HISTORY}
        self._logs = {part: self._open_epoch_log(part) for part in ("train", "test")}
        self._batch_log = self._open_batch_log(batches)
        first = self._finished_steps + batches + 1
        self._events = (
            Events(self.run_dir, first if history else 0) if tensorboard else NullEvents()
        )

    def batch(
        self,
        epoch: int,
        step: int,
        loss: float,
        top1: float,
        top5: float,
        lr: float,
        seconds: float,
    ) -> None:
        """One row of `train_batch.log`.

        Args:
            step: optimizer steps so far in the whole run, this one included; the column `batch`
                counts them within the epoch.
            loss, top1, top5: over the images of this step, or since the row before.
            seconds: of training since the epoch began.
        """
        batch = step - self._finished_steps
        row = (epoch, batch, loss, top1, top5, lr, seconds)
        self._batch_log.write(_format_row(row) + "\n")
        self._events.scalar("batch/loss", loss, step)
        self._events.scalar("batch/lr", lr, step)

    def epoch(self, epoch: int, train: dict[str, Any], test: dict[str, Any]) -> None:
        """One row of `train.log` and of `test.log`, and the curves so far.

        Args:
            train: `loss top1 top5 lr seconds`, and `steps`, the optimizer steps of this epoch.
            test: `loss top1 top5 seconds`.
        """
        step = self._finished_steps + int(train["steps"])
        parts = {"train": train, "test": {**test, "lr": train["lr"]}}
        self.history["epoch"].append(epoch)
        self.history["step"].append(step)
        for part, values in parts.items():  # all, before a full disk refuses a row
            for key in VALUES:
                self.history[f"{part}_{key}"].append(float(values[key]))
        for part, values in parts.items():
            self._logs[part].write(_format_row(self._epoch_row(part, -1)) + "\n")
            for key in ("loss", "top1", "top5"):
                self._events.scalar(f"{part}/{key}", values[key], step)
        if self._plot:
            title = visible("/".join(self.run_dir.resolve().parts[-2:]))
            plot_training(self.history, self.run_dir / PLOT_NAME, title=title)
            gc.collect()  # parts of a figure know each other, and its pixels: megabytes would wait

    def filters(self, epoch: int, raw: Tensor | None, whitened: Tensor | None) -> None:
        """Images of the first layer's filters (O C h w) after `epoch` (0: before training).

        Raises:
            ValueError: `epoch` has not been logged yet.
        """
        steps = dict(zip([0, *self.history["epoch"]], [0, *self.history["step"]], strict=True))
        if epoch not in steps:
            raise ValueError(f"filters of epoch {epoch}, which is not logged yet")
        for tag, weight in (("first_layer", raw), ("first_layer_whitened", whitened)):
            if weight is not None:
                self._events.image(f"filters/{tag}", draw_filters(weight), steps[epoch])

    def layers(self, figures: Mapping[str, float]) -> None:
        """Metrics about layers, by names, after the last epoch."""
        for name, value in figures.items():
            self._events.scalar(f"layers/{name}", value, self._finished_steps)

    def summary(self, values: dict[str, Any]) -> None:
        """Write `summary.json`; NaN and infinity, which JSON does not have, become null."""
        text = json.dumps(_without_nonfinite(values), indent=2, allow_nan=False)
        with atomic_write(self.run_dir / "summary.json") as file:
            file.write(text.encode() + b"\n")

    def close(self) -> None:
        for file in (*self._logs.values(), self._batch_log, self._events):
            file.close()

    @property
    def _finished_steps(self) -> int:
        """Optimizer steps of the epochs logged so far."""
        return self.history["step"][-1] if self.history["step"] else self._start_step

    def _epoch_row(self, part: str, index: int) -> list[float]:
        columns = ("epoch", *(f"{part}_{key}" for key in VALUES))
        return [self.history[column][index] for column in columns]

    def _open_epoch_log(self, part: str) -> TextIO:
        rows = (self._epoch_row(part, index) for index in range(len(self.history["epoch"])))
        return _open_log(self.run_dir / f"{part}.log", EPOCH_COLUMNS, rows)

    def _open_batch_log(self, batches: int) -> TextIO:
        path = self.run_dir / BATCH_LOG_NAME
        last = self.history["epoch"][-1] if self.history["epoch"] else self._start_epoch
        rows = _whole_rows(path) if self.history["epoch"] or batches else []
        kept = [row for row in rows if row[0] <= last or (row[0] == last + 1 and row[1] <= batches)]
        return _open_log(path, BATCH_COLUMNS, kept)


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file of a run's folder says.

    Raises:
        OSError: there is none that can be read.
        ValueError: it holds something else, naming the file.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def read_log(path: str | Path) -> dict[str, list[float]]:
    """The columns of a log by their names; `epoch` and `batch` are whole numbers.

    Raises:
        ValueError: naming the file and the line that is not a row of numbers.
    """
    header, *lines = Path(path).read_text(encoding="utf-8").splitlines() or [""]
    columns = header.split("\t")
    rows = []
    for number, line in enumerate(lines, start=2):
        try:
            rows.append(_parse_row(line, columns))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return {column: [row[index] for row in rows] for index, column in enumerate(columns)}


def _parse_row(line: str, columns: Sequence[str]) -> list[float]:
    cells = line.split("\t")
    if len(cells) != len(columns):
        raise ValueError(f"{len(cells)} values for the {len(columns)} columns {' '.join(columns)}")
    whole = ("epoch", "batch")
    pairs = zip(columns, cells, strict=True)
    return [int(cell) if column in whole else float(cell) for column, cell in pairs]


def _whole_rows(path: Path) -> list[list[float]]:
    """The rows of `train_batch.log`, up to a line that a crash has torn."""
    rows: list[list[float]] = []
    if not path.is_file():  # a pipe would be waited for
        return rows
    with suppress(ValueError), open(path, encoding="utf-8") as lines:
        next(lines, None)  # the header
        for line in lines:
            if not line.endswith("\n"):
                break
            rows.append(_parse_row(line, BATCH_COLUMNS))
    return rows


def _open_log(path: Path, columns: Sequence[str], rows: Iterable[Sequence[float]]) -> TextIO:
    """A log that holds the header and `rows`, opened to append further ones line by line."""
    lines = ["\t".join(columns), *(_format_row(row) for row in rows)]
    with atomic_write(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    return open(path, "a", buffering=1, encoding="utf-8", newline="\n")  # 1: flush every line


def _format_row(values: Sequence[float]) -> str:
    return "\t".join(str(v) if isinstance(v, int) else f"{float(v):.6g}" for v in values)


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
