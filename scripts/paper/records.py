"""Keep records of runs in results/RECIPE.json: settings, machine, metrics and training curve.

A record holds no image, no checkpoint and no path of the machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from util.cli.inherited import MAY_CHANGE
from util.files import atomic_write
from util.tracking.logger import BATCH_LOG_NAME, read_json, read_log
from util.tracking.provenance import RECORD_NAME
from util.training.recorder import DIVERGED_NAME

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
KEPT = {"epochs", "max_steps", "preset"}
KEPT |= {"threads", "deterministic", "compile", "cuda_graphs", "channels_last"}  # set the time
DROPPED = MAY_CHANGE - KEPT  # flags
MACHINE = ("versions", "commit", "device", "processor", "processes", "platform")
METRICS = ("kind", "parameters", "epoch_steps", "steps", "train_loss", "train_top1")
METRICS += ("test_loss", "test_top1", "train_seconds", "test_seconds", "peak_memory_mb")
CURVE_POINTS = 120  # a longer curve of the training loss is averaged

Records = dict[str, dict[str, Any]]  # by run name


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a finished or diverged run."""
    provenance = read_or_exit(folder / RECORD_NAME)
    flags = {name: value for name, value in provenance["flags"].items() if name not in DROPPED}
    record = {"flags": flags, **{key: provenance.get(key) for key in MACHINE}}
    if (folder / DIVERGED_NAME).exists():
        record["diverged"] = read_or_exit(folder / DIVERGED_NAME)["step"]
    if (folder / "summary.json").exists():
        summary = read_or_exit(folder / "summary.json")
        record |= {key: summary.get(key) for key in METRICS}
    return record | {"epochs": _read_epochs(folder), "curve": read_curve(folder)}


def round_floats(record: dict[str, Any]) -> dict[str, Any]:
    """Round to six significant digits; replace a non-finite number by None."""
    round_float, drop = lambda text: float(f"{float(text):.6g}"), lambda text: None
    return json.loads(json.dumps(record), parse_float=round_float, parse_constant=drop)


def load(name: str, results: Path = RESULTS) -> Records:
    """Return the records of a recipe, empty before its first `save`.

    Raises:
        SystemExit: the file was not written by `save`.
    """
    path = results / f"{name}.json"
    return read_or_exit(path) if path.exists() else {}


def read_or_exit(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        SystemExit: the file cannot be read or holds something else.
    """
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


def save(name: str, records: Records, results: Path = RESULTS) -> None:
    """Write the records of a recipe, one line per run."""
    lines = [f"{json.dumps(key)}: {json.dumps(records[key])}" for key in sorted(records)]
    results.mkdir(exist_ok=True)
    with atomic_write(results / f"{name}.json") as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def top1_of(record: dict[str, Any] | None) -> float | None:
    """Return the test top-1 in percent, None for a missing or diverged run."""
    return None if record is None or "diverged" in record else record["test_top1"]


def look_up_top1(records: Records, name: str, unknown: float | None = None) -> float | None:
    """Return the test top-1 of a run in percent, 0 after divergence, `unknown` if missing."""
    return (top1_of(records[name]) or 0.0) if name in records else unknown


def _read_epochs(folder: Path) -> list[list[float]]:
    """Return per epoch its number, training and test loss and top-1, learning rate and seconds."""
    train, test = (read_log(folder / f"{part}.log") for part in ("train", "test"))
    columns = [train["epoch"], train["loss"], train["top1"], test["loss"], test["top1"]]
    return [list(row) for row in zip(*columns, train["lr"], train["seconds"], strict=True)]


def read_curve(folder: Path, column: str = "loss") -> list[list[float]]:
    """Return pairs of optimizer step and training loss, or another column of train_batch.log."""
    log = read_log(folder / BATCH_LOG_NAME)
    longest = max(log["batch"], default=0)
    steps = [(e - 1) * longest + b for e, b in zip(log["epoch"], log["batch"], strict=True)]
    width = -(-len(steps) // CURVE_POINTS) if steps else 1
    parts = [slice(start, start + width) for start in range(0, len(steps), width)]
    return [[steps[part][-1], fmean(log[column][part])] for part in parts]
