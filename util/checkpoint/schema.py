"""Schema of a checkpoint, which every checkpoint is checked against when it is read.

A checksum proves that a file is unchanged, not that this program wrote it.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from math import inf, isnan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from util.errors import MAX_COUNT, ContentError, describe

MAX_CHANNELS = 1024  # a file that claims more would make the first layer fill the memory
TWISTER_WORDS = 624  # size of the state of a Mersenne Twister
# Flags added later whose defaults differ from what earlier runs did.
EARLIER = {"root_final": "newton"}
VALUES = ("loss", "top1", "top5", "lr", "seconds")  # columns of train.log and test.log
HISTORY = ("epoch", "step", *(f"{part}_{key}" for part in ("train", "test") for key in VALUES))
EMA_VALUES = ("ema_loss", "ema_top1")  # more columns of test.log and val.log, with --ema


class Rule(NamedTuple):
    """Test of a single value; `expected` describes a valid value in error messages."""

    expected: str
    is_valid: Callable[[Any], bool]


class ListOf(NamedTuple):
    """Schema of a list or tuple, by the schema of its items."""

    item: Schema
    minimum: int = 0


# {"name": schema}: a dict with at least these keys; {type: schema}: with keys of this type only.
Schema = Rule | ListOf | dict


def check_value(path: str, value: Any, schema: Schema) -> None:
    """Check types, ranges, shapes and nesting of a value.

    Args:
        path: place of the value, such as "progress.step"; "" for a whole checkpoint.
        value: anything.
        schema: what the value must match.

    Raises:
        ContentError: names the first place whose value is not valid.
    """
    if isinstance(schema, Rule):
        if not schema.is_valid(value):
            raise ContentError(f"{path} is {describe(value)}, not {schema.expected}")
    elif isinstance(schema, ListOf):
        least = schema.minimum
        is_list = type(value) in (list, tuple) and len(value) >= least
        check_value(path, value, Rule(f"a list of {least} or more", lambda _: is_list))
        for index, item in enumerate(value):
            check_value(f"{path}[{index}]", item, schema.item)
    else:
        check_value(path, value, DICT)
        key_type = next((key for key in schema if isinstance(key, type)), str)
        rule = Rule(f"of type {key_type.__name__}", lambda key: type(key) is key_type)
        for key in value:
            check_value(f"a key of {path or 'the content'}", key, rule)
        for key in value if key_type in schema else schema:
            inner = f"{path}.{str(key)[:80]}".lstrip(".")
            if key not in value:
                raise ContentError(f"{inner} is missing")
            check_value(inner, value[key], schema.get(key_type) or schema[key])


def check_content(state: Any) -> None:
    """Check a checkpoint against the schema, and its counts against each other.

    Raises:
        ContentError: names the first value that is not valid.
    """
    check_value("", state, CONTENT)
    check_value("model._metadata", getattr(state["model"], "_metadata", {}), {str: {str: COUNT}})
    if state["scaler"]:  # only --amp fp16 has one
        check_value("scaler", state["scaler"], SCALER)
    for key, rule in (("best_step", COUNT), ("best_test_top1", PROGRESS["best_top1"])):
        check_value(f"progress.{key}", state["progress"].get(key, 0), rule)
    check_value("cut", state.get("cut", state["meters"]), METERS)  # older checkpoints lack it
    tests, more = ["test"], []  # columns of the history beside HISTORY
    val_split = state["config"].get("val_split")
    if type(val_split) is float and val_split > 0:
        tests.append("val")
        more += [f"val_{key}" for key in VALUES]
    if state["config"].get("ema") is not None:
        more += [f"{test}_{key}" for test in tests for key in EMA_VALUES]
        check_value("ema", state.get("ema"), EMA)
    check_value("history", state["history"], dict.fromkeys(more, METRICS))
    more += HISTORY
    progress, history, spec = state["progress"], state["history"], state["spec"]
    channels = equal(spec["in_channels"])
    steps, epochs = progress["step"] + len(state["meters"]["rows"]), len(history["epoch"])
    # An epoch under way was tested if --max-steps had cut it short before.
    tested = progress["epoch"] + (len(state["meters"]["rows"]) > 0)
    for name, value, rule in (
        ("progress.best_epoch", progress["best_epoch"], integer(0, tested)),
        ("epoch", state["epoch"], equal(progress["epoch"])),
        ("epoch", state["epoch"], integer(0, state["config"]["epochs"])),
        ("step", state["step"], equal(steps)),
        ("best_top1", state["best_top1"], equal(progress["best_top1"])),
        *((f"the length of spec.{key}", len(spec[key]), channels) for key in ("mean", "std")),
        *((f"the length of history.{key}", len(history[key]), equal(epochs)) for key in more),
    ):
        check_value(name, value, rule)
    for key in ("epoch", "step") if epochs else ():
        check_value(f"history.{key}[-1]", history[key][-1], equal(progress[key]))


def equal(expected: Any) -> Rule:
    """Return a rule for a value that must be `expected`."""
    return Rule(f"{describe(expected)} as elsewhere", lambda value: value == expected)


def integer(minimum: int = 0, maximum: int = MAX_COUNT) -> Rule:
    """Return a rule for integers in a range; a bool is not an integer."""
    bounds = f"of {minimum} or more" if maximum == MAX_COUNT else f"from {minimum} to {maximum}"
    return Rule(
        f"an integer {bounds}", lambda value: type(value) is int and minimum <= value <= maximum
    )


def number(minimum: float = -inf, maximum: float = inf, *, nan: bool = False) -> Rule:
    """Return a rule for numbers that a float holds; `nan` accepts NaN, too."""

    def is_valid(value: Any) -> bool:
        is_number = type(value) is float or (type(value) is int and abs(value) < MAX_COUNT)
        return is_number and (minimum <= value <= maximum or (nan and isnan(value)))

    return Rule(f"a number from {minimum:g} to {maximum:g}", is_valid)


def vector(size: int, dtype: torch.dtype) -> Rule:
    """Return a rule for plain tensors of one dimension."""
    return Rule(
        f"a plain tensor of {size} numbers, {dtype}",
        lambda value: _is_plain(value) and value.dtype == dtype and value.shape == (size,),
    )


def accepted_by(set_state: Callable[[Any], object], owner: str) -> Rule:
    """Return a rule for states of the generator `owner`, which `set_state` sets."""

    def is_valid(value: Any) -> bool:
        try:
            set_state(value)
        except Exception:  # from a wrong type to an overflow
            return False
        return True

    return Rule(f"a state of {owner}'s generator", is_valid)


def _is_plain(value: Any) -> bool:
    """Check for a strided tensor without attributes that holds values."""
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided and not vars(value)
    return is_plain and not value.is_meta


def _is_table(value: Any) -> bool:
    """Check for finite rows (N, 4), contiguous so that a small file cannot claim endless rows."""
    is_float = _is_plain(value) and value.dtype in (torch.float64, torch.float32)
    is_table = is_float and value.shape[1:] == (4,) and value.is_contiguous()
    return is_table and bool(value.isfinite().all())


def _is_plain_dict(value: Any) -> bool:
    """Check for a dict without attributes: an OrderedDict of a file may override `items`."""
    if type(value) is OrderedDict:
        return vars(value).keys() <= {"_metadata"}
    return type(value) is dict


DICT = Rule("a dict", _is_plain_dict)
TEXT = Rule("a text", lambda value: type(value) is str)
TENSOR = Rule("a plain tensor", _is_plain)
TENSOR_OR_NONE = Rule("a plain tensor", lambda value: value is None or _is_plain(value))
COUNT, SIZE, TIME = integer(), integer(1), number(0, MAX_COUNT)
NUMPY_STATE = {
    "bit_generator": equal("MT19937"),
    "state": {"key": vector(TWISTER_WORDS, torch.int64), "pos": integer(0, TWISTER_WORDS)},
    "has_gauss": integer(0, 1),
    "gauss": number(),
}
RNG = {
    "torch": accepted_by(torch.Generator().set_state, "PyTorch"),
    "cuda": ListOf(vector(16, torch.uint8)),
    "numpy": NUMPY_STATE,
    "python": accepted_by(random.Random().setstate, "Python"),
}
SPEC = {
    "name": TEXT,
    "in_channels": integer(1, MAX_CHANNELS),
    "image_size": SIZE,
    "classes": ListOf(TEXT, 1),
    "mean": ListOf(number(), 1),
    "std": ListOf(number(2.0**-20), 1),
}
PROGRESS = {
    **dict.fromkeys(("epoch", "step", "images", "best_epoch"), COUNT),
    "best_top1": number(maximum=100),
    "train_seconds": TIME,
    "test_seconds": TIME,
    "latest": {str: number(nan=True)},
}
METERS = {
    "rows": Rule("a plain and finite tensor of N x 4 floats", _is_table),
    "lr": number(nan=True),
    "seconds": TIME,
}
SCALER = {
    "scale": number(2.0**-60, 2.0**60),
    "growth_factor": number(1, MAX_COUNT),
    "backoff_factor": number(2.0**-60, 1),
    "growth_interval": SIZE,
    "_growth_tracker": COUNT,
}
METRICS = ListOf(number(nan=True))
EMA = {"model": {str: TENSOR}, "own_buffers": ListOf({str: TENSOR})}
CONTENT = {
    "epoch": COUNT,
    "step": COUNT,
    "best_top1": PROGRESS["best_top1"],
    "config": {"epochs": SIZE},  # util.cli.inherited checks the flags
    "spec": SPEC,
    "progress": PROGRESS,
    "meters": METERS,
    "model": {str: TENSOR},
    "optimizer": {
        "state": {int: {str: TENSOR_OR_NONE}},
        "param_groups": ListOf({"params": ListOf(COUNT)}, 1),
    },
    "scaler": DICT,
    "rng": ListOf(RNG, 1),
    "history": dict.fromkeys(HISTORY, METRICS) | dict.fromkeys(("epoch", "step"), ListOf(COUNT)),
    "own_buffers": ListOf({str: TENSOR}),  # one dict per rank
    "images": {str: SIZE},
    "skipped": ListOf(TEXT),
}
