"""Validators for the content of a checkpoint: types, ranges, shapes and nesting.

A validator is a function of a path such as "progress.step" and the value that stands there. It
raises `ContentError` if the value is not valid. Small validators combine into larger ones.

Example:
    >>> record({"step": integer(0), "loss": optional(number())})("", {"step": 3, "loss": None})
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import inf, isnan
from typing import Any

import torch
from torch import Tensor

from util.errors import ContentError

MAX_COUNT = 2**62

Validator = Callable[[str, Any], None]  # (path, value); raises ContentError


def describe(value: Any) -> str:
    """Describe any value in a few words, however large or nested it is."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if type(value) is int and abs(value) >= MAX_COUNT:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)):
        return repr(value[:40]) + ("..." if len(value) > 40 else "")
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    size = f" of {len(value)}" if isinstance(value, (dict, list, tuple, set)) else ""
    return f"a {type(value).__name__}{size}"


def require(expected: str, is_valid: Callable[[Any], bool]) -> Validator:
    """Return a validator that calls `is_valid`; `expected` describes a valid value."""

    def validate(path: str, value: Any) -> None:
        if not is_valid(value):
            raise ContentError(f"{path} is {describe(value)}, not {expected}")

    return validate


def any_value(path: str, value: Any) -> None:
    """Accept any value; nothing reads it."""


def integer(minimum: int = 0, maximum: int = MAX_COUNT) -> Validator:
    """Return a validator of integers in a range; a bool is not an integer."""
    bounds = f"of {minimum} or more" if maximum == MAX_COUNT else f"from {minimum} to {maximum}"
    return require(
        f"an integer {bounds}", lambda value: type(value) is int and minimum <= value <= maximum
    )


def number(minimum: float = -inf, maximum: float = inf, *, nan: bool = False) -> Validator:
    """Return a validator of numbers that a float holds; `nan` accepts NaN, too."""

    def is_valid(value: Any) -> bool:
        is_number = type(value) is float or (type(value) is int and abs(value) < MAX_COUNT)
        return is_number and (minimum <= value <= maximum or (nan and isnan(value)))

    return require(f"a number from {minimum:g} to {maximum:g}", is_valid)


def text(path: str, value: Any) -> None:
    """Accept a str."""
    require("a text", lambda value: type(value) is str)(path, value)


def tensor(
    *dtypes: torch.dtype, shape: tuple[int | None, ...] = (), finite: bool = False
) -> Validator:
    """Return a validator of plain strided tensors.

    Args:
        dtypes: accepted dtypes; any if empty. A tensor of given dtypes must be contiguous, too.
        shape: sizes, where None is any size; ignored without `dtypes`.
        finite: whether all values must be finite.
    """

    def is_valid(value: Any) -> bool:
        is_plain = isinstance(value, Tensor) and value.layout == torch.strided and not vars(value)
        if not is_plain or value.is_meta:  # a file may store a tensor without values
            return False
        if not dtypes:
            return True
        has_shape = len(shape) == value.ndim and all(
            size in (None, actual) for size, actual in zip(shape, value.shape, strict=True)
        )
        has_layout = has_shape and value.dtype in dtypes and value.is_contiguous()
        return has_layout and (not finite or bool(value.isfinite().all()))

    sizes = " x ".join("N" if size is None else str(size) for size in shape)
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    details = f" of {names}, {sizes}" if dtypes else ""
    return require(f"a plain{' and finite' if finite else ''} tensor{details}", is_valid)


def optional(validator: Validator) -> Validator:
    """Return a validator that accepts None, too."""
    return lambda path, value: None if value is None else validator(path, value)


def optional_dict(validator: Validator) -> Validator:
    """Return a validator that accepts an empty dict, too."""
    return lambda path, value: (
        None if _is_plain_dict(value) and not value else validator(path, value)
    )


def dict_of(key_type: type, validator: Validator) -> Validator:
    """Return a validator of dicts with keys of one type and values of one kind."""
    validate_key = require(f"of type {key_type.__name__}", lambda key: type(key) is key_type)

    def validate(path: str, value: Any) -> None:
        require("a dict", _is_plain_dict)(path or "the content", value)
        for key, item in value.items():
            validate_key(f"a key of {path or 'the content'}", key)
            validator(f"{path}.{str(key)[:80]}", item)

    return validate


def record(fields: Mapping[str, Validator]) -> Validator:
    """Return a validator of dicts that hold at least the keys of `fields`."""

    def validate(path: str, value: Any) -> None:
        dict_of(str, any_value)(path, value)
        prefix = f"{path}." if path else ""
        for key, validator in fields.items():
            if key not in value:
                raise ContentError(f"{prefix}{key} is missing")
            validator(prefix + key, value[key])

    return validate


def list_of(validator: Validator, minimum: int = 0) -> Validator:
    """Return a validator of lists and tuples with at least `minimum` items of one kind."""

    def is_valid(value: Any) -> bool:
        return type(value) in (list, tuple) and len(value) >= minimum

    def validate(path: str, value: Any) -> None:
        require(f"a list of {minimum} or more", is_valid)(path, value)
        for index, item in enumerate(value):
            validator(f"{path}[{index}]", item)

    return validate


def _is_plain_dict(value: Any) -> bool:
    """Check for a dict without attributes: an OrderedDict of a file may override `items`."""
    if type(value) is OrderedDict:
        return vars(value).keys() <= {"_metadata"}
    return type(value) is dict
