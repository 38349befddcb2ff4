"""What a checkpoint holds, as a table that its content is compared with whenever it is read.

A checksum tells that a file is as it was written, not that this program wrote it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from util.checkpoint.validators import (
    MOST,
    anything,
    blank_or,
    describe,
    each,
    expect,
    fields,
    items,
    maybe,
    real,
    row,
    tensor,
    whole,
)
from util.errors import ContentError

MOST_CHANNELS = 1024  # of images: a layer as wide as a file says could need all memory
TWISTER = 624  # words of the Mersenne Twister's state
VALUES = ("loss", "top1", "top5", "lr", "seconds")  # of a row of train.log and of test.log
HISTORY = ("epoch", "step", *(f"{part}_{key}" for part in ("train", "test") for key in VALUES))


def check_content(state: Any, *, has_values: bool = True) -> None:
    """See that `state` is what a checkpoint holds: types, ranges, shapes, and sums that agree.

    Args:
        has_values: False where it was read to the device "meta", and tensors hold nothing.

    Raises:
        ContentError: naming the first that is wrong.
    """
    CONTENT("", state)
    for place, value in _name_own_tensors(state):
        if has_values and value.is_meta:  # a file can say that a tensor has none
            raise ContentError(f"{place} is {describe(value)} without values")
    done, rows = state["progress"], state["meters"]["rows"] if state["meters"] else ()
    _agree("epoch", state["epoch"], "that of progress", done["epoch"])
    _agree("step", state["step"], "progress.step and the rows of meters", done["step"] + len(rows))
    _agree("best_top1", state["best_top1"], "that of progress", done["best_top1"])
    whole(0, done["epoch"])("progress.best_epoch", done["best_epoch"])
    whole(0, state["config"]["epochs"])("epoch", done["epoch"])
    past = state["history"]
    for key in HISTORY:
        _agree(f"the length of history.{key}", len(past[key]), "of epoch", len(past["epoch"]))
    for key in ("epoch", "step") if past["epoch"] else ():
        _agree(f"history.{key}[-1]", past[key][-1], "that of progress", done[key])


def _name_own_tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that this program reads itself; PyTorch refuses others that have no values."""
    if state["meters"]:
        yield "meters.rows", state["meters"]["rows"]
    for rank, generators in enumerate(state["rng"]):
        yield f"rng[{rank}].torch", generators["torch"]
        yield f"rng[{rank}].numpy.state.key", generators["numpy"]["state"]["key"]
        for index, value in enumerate(generators["cuda"]):
            yield f"rng[{rank}].cuda[{index}]", value


def _agree(name: str, value: float, other_name: str, other: float) -> None:
    if value != other:
        raise ContentError(f"{name} is {describe(value)}, but {other_name} {describe(other)}")


def weights(place: str, value: Any) -> None:
    """What `Module.state_dict` gives, with the versions of layers as an attribute."""
    each(str, tensor())(place, value)
    each(str, each(str, whole()))(f"{place}._metadata", getattr(value, "_metadata", {}))


def _is_torch_state(value: Any) -> bool:
    try:
        return value.is_meta or torch.Generator().set_state(value.cpu()) is not None
    except (AttributeError, RuntimeError, TypeError):
        return False


def _is_python_state(value: Any) -> bool:
    try:
        return random.Random().setstate((3, value, None)) is None
    except (OverflowError, TypeError, ValueError):
        return False


WORD = expect("a word", lambda value: type(value) is str)
RNG = {
    "torch": expect("a state of PyTorch's generator", _is_torch_state),
    "cuda": items(tensor(torch.uint8, shape=(16,))),
    "numpy": fields(
        {
            "bit_generator": expect("'MT19937'", lambda value: describe(value) == "'MT19937'"),
            "state": fields(
                {"key": tensor(torch.int64, shape=(TWISTER,)), "pos": whole(0, TWISTER)}
            ),
            "has_gauss": whole(0, 1),
            "gauss": real(),
        }
    ),
    "python": row(
        whole(3, 3), expect("a state of Python's generator", _is_python_state), maybe(real())
    ),
}
SPEC = {
    "name": WORD,
    "in_channels": whole(1, MOST_CHANNELS),
    "image_size": whole(1),
    "classes": items(WORD, 1),
    "mean": items(real(), 1),
    "std": items(real(), 1),
}
PROGRESS = {
    "epoch": whole(),
    "step": whole(),
    "images": whole(),
    "best_top1": real(most=100),
    "best_epoch": whole(),
    "train_seconds": real(0, MOST),
    "test_seconds": real(0, MOST),
    "latest": each(str, real(nan=True)),
}
SCALER = {
    "scale": real(2.0**-60, 2.0**60),
    "growth_factor": real(1, MOST),
    "backoff_factor": real(2.0**-60, 1),
    "growth_interval": whole(1),
    "_growth_tracker": whole(),
}
CONTENT = fields(
    {
        "epoch": whole(),
        "step": whole(),
        "best_top1": PROGRESS["best_top1"],
        "config": fields({"epochs": whole(1)}),  # flags have rules of their own
        "spec": fields(SPEC),
        "progress": fields(PROGRESS),
        "meters": maybe(
            fields(
                {
                    "rows": tensor(torch.float64, torch.float32, shape=(None, 4), finite=True),
                    "lr": real(nan=True),
                    "seconds": real(0, MOST),
                }
            )
        ),
        "model": weights,
        "optimizer": fields(
            {
                "state": each(int, each(str, maybe(tensor()))),
                "param_groups": items(fields({"params": items(whole())}), 1),
            }
        ),
        "scheduler": anything,
        "scaler": blank_or(fields(SCALER)),  # only --amp fp16 has one
        "rng": items(fields(RNG), 1),
        "history": fields(
            dict.fromkeys(HISTORY, items(real(nan=True)))
            | dict.fromkeys(("epoch", "step"), items(whole()))
        ),
    },
    own_buffers=items(each(str, tensor())),
    images=each(str, whole(1)),
    skipped=items(WORD),
)
