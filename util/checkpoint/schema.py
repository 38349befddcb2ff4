"""Schema of a checkpoint, which every checkpoint is validated against when it is read.

A checksum proves that a file is unchanged, not that this program wrote it.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from util.checkpoint.validators import (
    MAX_COUNT,
    any_value,
    describe,
    dict_of,
    integer,
    list_of,
    number,
    optional,
    optional_dict,
    record,
    require,
    tensor,
    text,
)
from util.errors import ContentError

MAX_CHANNELS = 1024  # a file that claims more would make the first layer fill the memory
TWISTER_WORDS = 624  # size of the state of a Mersenne Twister
VALUES = ("loss", "top1", "top5", "lr", "seconds")  # columns of train.log and test.log
HISTORY = ("epoch", "step", *(f"{part}_{key}" for part in ("train", "test") for key in VALUES))


def check_content(state: Any) -> None:
    """Check types, ranges, shapes and the agreement of counts in a checkpoint.

    Raises:
        ContentError: names the first value that is not valid.
    """
    CONTENT("", state)
    progress = state["progress"]
    steps = progress["step"] + (len(state["meters"]["rows"]) if state["meters"] else 0)
    _check_equal("epoch", state["epoch"], "progress.epoch is", progress["epoch"])
    _check_equal("step", state["step"], "progress.step and meters.rows add up to", steps)
    _check_equal("best_top1", state["best_top1"], "progress.best_top1 is", progress["best_top1"])
    integer(0, progress["epoch"])("progress.best_epoch", progress["best_epoch"])
    integer(0, state["config"]["epochs"])("epoch", progress["epoch"])
    history = state["history"]
    epochs = len(history["epoch"])
    for key in HISTORY:
        _check_equal(f"the length of history.{key}", len(history[key]), "of epoch it is", epochs)
    for key in ("epoch", "step") if epochs else ():
        _check_equal(f"history.{key}[-1]", history[key][-1], f"progress.{key} is", progress[key])


def _check_equal(name: str, value: float, expected_name: str, expected: float) -> None:
    if value != expected:
        raise ContentError(f"{name} is {describe(value)}, but {expected_name} {describe(expected)}")


def model_state(path: str, value: Any) -> None:
    """Validate a `Module.state_dict()`, whose attribute `_metadata` holds versions of layers."""
    dict_of(str, tensor())(path, value)
    dict_of(str, dict_of(str, integer()))(f"{path}._metadata", getattr(value, "_metadata", {}))


def _is_torch_state(value: Any) -> bool:
    try:
        return torch.Generator().set_state(value.cpu()) is not None
    except (AttributeError, RuntimeError, TypeError):
        return False


def _is_python_state(value: Any) -> bool:
    if not (type(value) is tuple and len(value) == 3 and type(value[2]) in (float, type(None))):
        return False
    try:
        return describe(value[0]) == "3" and random.Random().setstate(value) is None
    except (OverflowError, TypeError, ValueError):
        return False


TWISTER = {"key": tensor(torch.int64, shape=(TWISTER_WORDS,)), "pos": integer(0, TWISTER_WORDS)}
NUMPY_STATE = {
    "bit_generator": require("'MT19937'", lambda value: describe(value) == "'MT19937'"),
    "state": record(TWISTER),
    "has_gauss": integer(0, 1),
    "gauss": number(),
}
RNG = {
    "torch": require("a state of PyTorch's generator", _is_torch_state),
    "cuda": list_of(tensor(torch.uint8, shape=(16,))),
    "numpy": record(NUMPY_STATE),
    "python": require("a state of Python's generator", _is_python_state),
}
SPEC = {
    "name": text,
    "in_channels": integer(1, MAX_CHANNELS),
    "image_size": integer(1),
    "classes": list_of(text, 1),
    "mean": list_of(number(), 1),
    "std": list_of(number(), 1),
}
PROGRESS = {
    "epoch": integer(),
    "step": integer(),
    "images": integer(),
    "best_top1": number(maximum=100),
    "best_epoch": integer(),
    "train_seconds": number(0, MAX_COUNT),
    "test_seconds": number(0, MAX_COUNT),
    "latest": dict_of(str, number(nan=True)),
}
METERS = {
    "rows": tensor(torch.float64, torch.float32, shape=(None, 4), finite=True),
    "lr": number(nan=True),
    "seconds": number(0, MAX_COUNT),
}
OPTIMIZER = {
    "state": dict_of(int, dict_of(str, optional(tensor()))),
    "param_groups": list_of(record({"params": list_of(integer())}), 1),
}
SCALER = {
    "scale": number(2.0**-60, 2.0**60),
    "growth_factor": number(1, MAX_COUNT),
    "backoff_factor": number(2.0**-60, 1),
    "growth_interval": integer(1),
    "_growth_tracker": integer(),
}
CONTENT = record(
    {
        "epoch": integer(),
        "step": integer(),
        "best_top1": PROGRESS["best_top1"],
        "config": record({"epochs": integer(1)}),  # util.cli.inherited validates the flags
        "spec": record(SPEC),
        "progress": record(PROGRESS),
        "meters": optional(record(METERS)),
        "model": model_state,
        "optimizer": record(OPTIMIZER),
        "scheduler": any_value,
        "scaler": optional_dict(record(SCALER)),  # only --amp fp16 has one
        "rng": list_of(record(RNG), 1),
        "history": record(
            dict.fromkeys(HISTORY, list_of(number(nan=True)))
            | dict.fromkeys(("epoch", "step"), list_of(integer()))
        ),
        "own_buffers": list_of(dict_of(str, tensor())),  # one dict per rank
        "images": dict_of(str, integer(1)),
        "skipped": list_of(text),
    }
)
