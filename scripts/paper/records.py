"""What is kept of a run: a record of settings, machine and figures, in results/RECIPE.json.

Neither pictures nor checkpoints, nor where files lay on the machine that trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from util.cli.inherited import MAY_CHANGE
from util.files import atomic_write
from util.tracking.logger import BATCH_LOG_NAME, read_json, read_log
from util.tracking.provenance import RECORD_NAME
from util.training.recorder import DIVERGED_NAME

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
KEPT = {"epochs", "max_steps", "preset"}
KEPT |= {"threads", "deterministic", "compile", "cuda_graphs", "channels_last"}  # for the seconds
LEFT_OUT = MAY_CHANGE - KEPT  # flags
MACHINE = ("versions", "commit", "device", "processor", "processes", "platform")
FIGURES = ("kind", "parameters", "epoch_steps", "steps", "train_loss", "train_top1")
FIGURES += ("test_loss", "test_top1", "train_seconds", "test_seconds", "peak_memory_mb")
EPOCH_COLUMNS = ("epoch", "train_loss", "train_top1", "test_loss", "test_top1", "lr", "seconds")
CURVE_POINTS = 120  # of the training loss; longer curves are averaged to fewer

Records = dict[str, dict[str, Any]]  # by the names of the runs


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run that has come to its end."""
    made = read_or_exit(folder / RECORD_NAME)
    flags = {name: value for name, value in made["flags"].items() if name not in LEFT_OUT}
    record = {"flags": flags, **{key: made.get(key) for key in MACHINE}}
    if (folder / DIVERGED_NAME).exists():
        record["diverged"] = read_or_exit(folder / DIVERGED_NAME)["step"]
    if (folder / "summary.json").exists():
        summary = read_or_exit(folder / "summary.json")
        record |= {key: summary.get(key) for key in FIGURES}
    return _rounded({**record, "epochs": _read_epochs(folder), "curve": _read_curve(folder)})


def load(name: str, results: Path = RESULTS) -> Records:
    """The records of a recipe, none where it has no file yet.

    Raises:
        SystemExit: the file is not what `save` has written.
    """
    path = results / f"{name}.json"
    return read_or_exit(path) if path.exists() else {}


def read_or_exit(path: Path) -> dict[str, Any]:
    """What a file says that this project has written.

    Raises:
        SystemExit: it cannot be read, or says something else.
    """
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


def save(name: str, records: Records, results: Path = RESULTS) -> None:
    """Write them, a line for each run."""
    lines = [f"{json.dumps(key)}: {json.dumps(records[key])}" for key in sorted(records)]
    results.mkdir(exist_ok=True)
    with atomic_write(results / f"{name}.json") as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def top1_of(record: dict[str, Any] | None) -> float | None:
    """Test top-1 in percent; None where it was not run, or has diverged."""
    return None if record is None or "diverged" in record else record["test_top1"]


def _read_epochs(folder: Path) -> list[list[float]]:
    train, test = (read_log(folder / f"{part}.log") for part in ("train", "test"))
    columns = {"train_loss": train["loss"], "train_top1": train["top1"]}
    columns |= {"test_loss": test["loss"], "test_top1": test["top1"]}
    columns |= {key: train[key] for key in ("epoch", "lr", "seconds")}
    return [list(row) for row in zip(*(columns[key] for key in EPOCH_COLUMNS), strict=True)]


def _read_curve(folder: Path) -> list[list[float]]:
    """Optimizer step and training loss, by the rows of train_batch.log."""
    log = read_log(folder / BATCH_LOG_NAME)
    longest = max(log["batch"], default=0)
    steps = [(e - 1) * longest + b for e, b in zip(log["epoch"], log["batch"], strict=True)]
    share = -(-len(steps) // CURVE_POINTS) if steps else 1
    parts = [slice(start, start + share) for start in range(0, len(steps), share)]
    return [[steps[part][-1], _mean(log["loss"][part])] for part in parts]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rounded(value: Any) -> Any:
    """Six digits, which no table needs more of; what is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value
