"""Rules that content is compared with, made of smaller ones: types, ranges, shapes, nesting."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from util.errors import ContentError

MOST = 2**62  # of any count

Rule = Callable[[str, Any], None]  # (place, value); raises ContentError


def describe(value: Any) -> str:
    """A value in a few words, whatever it is: how large, how deep, how odd."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if type(value) is int and abs(value) >= MOST:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)):
        return repr(value[:40]) + ("..." if len(value) > 40 else "")
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    size = f" of {len(value)}" if isinstance(value, (dict, list, tuple, set)) else ""
    return f"a {type(value).__name__}{size}"


def expect(what: str, fits: Callable[[Any], bool]) -> Rule:
    """A rule for a value; `what` it has to be, in words."""

    def check(place: str, value: Any) -> None:
        if not fits(value):
            raise ContentError(f"{place} is {describe(value)}, not {what}")

    return check


def whole(least: int = 0, most: int = MOST) -> Rule:
    """A whole number; True is none."""
    bounds = f"of {least} or more" if most == MOST else f"from {least} to {most}"
    return expect(f"a whole number {bounds}", lambda v: type(v) is int and least <= v <= most)


def real(least: float = -math.inf, most: float = math.inf, *, nan: bool = False) -> Rule:
    """A number that a float holds, and NaN if `nan`."""

    def fits(value: Any) -> bool:
        number = type(value) is float or (type(value) is int and abs(value) < MOST)
        return number and (least <= value <= most or (nan and math.isnan(value)))

    return expect(f"a number from {least:g} to {most:g}", fits)


def tensor(*dtypes: torch.dtype, shape: tuple[int | None, ...] = (), finite: bool = False) -> Rule:
    """A plain tensor; of one of `dtypes`, then also compact and of a shape (None: any size)."""

    def fits(value: Any) -> bool:
        if not isinstance(value, Tensor) or value.layout != torch.strided or vars(value):
            return False
        if not dtypes:
            return True
        same = len(shape) == value.ndim and all(
            size in (None, side) for size, side in zip(shape, value.shape, strict=True)
        )
        known = same and value.dtype in dtypes and value.is_contiguous()
        return known and (not finite or value.is_meta or bool(value.isfinite().all()))

    sides = " x ".join("N" if size is None else str(size) for size in shape)
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    more = f" of {kinds}, {sides}" if dtypes else ""
    return expect(f"a plain{' and finite' if finite else ''} tensor{more}", fits)


def fields(rules: Mapping[str, Rule], **optional: Rule) -> Rule:
    """A dict of words with these keys, each with its rule; `optional` ones may lack."""

    def check(place: str, value: Any) -> None:
        each(str, anything)(place, value)
        within = f"{place}." if place else ""
        for key in rules:
            if key not in value:
                raise ContentError(f"{within}{key} is missing")
        for key, rule in {**rules, **optional}.items():
            if key in value:
                rule(within + key, value[key])

    return check


def each(kind: type, rule: Rule) -> Rule:
    """A dict whose keys are of one kind, and whose values obey one rule."""
    is_kind = expect(f"of type {kind.__name__}", lambda key: type(key) is kind)

    def check(place: str, value: Any) -> None:
        expect("a dict", _is_dict)(place or "the content", value)
        for key, item in value.items():
            is_kind(f"a key of {place or 'the content'}", key)
            rule(f"{place}.{str(key)[:80]}", item)

    return check


def items(rule: Rule, least: int = 0) -> Rule:
    """A list or tuple, of at least so many items, which obey one rule."""

    def check(place: str, value: Any) -> None:
        long = lambda v: type(v) in (list, tuple) and len(v) >= least
        expect(f"a list of {least} or more", long)(place, value)
        for index, item in enumerate(value):
            rule(f"{place}[{index}]", item)

    return check


def row(*rules: Rule) -> Rule:
    """A tuple with a rule for each place."""

    def check(place: str, value: Any) -> None:
        long = lambda v: type(v) is tuple and len(v) == len(rules)
        expect(f"a tuple of {len(rules)}", long)(place, value)
        for index, (rule, item) in enumerate(zip(rules, value, strict=True)):
            rule(f"{place}[{index}]", item)

    return check


def maybe(rule: Rule) -> Rule:
    """None, or what obeys the rule."""
    return lambda place, value: None if value is None else rule(place, value)


def blank_or(rule: Rule) -> Rule:
    """An empty dict, or what obeys the rule."""
    return lambda place, value: None if _is_dict(value) and not value else rule(place, value)


def anything(place: str, value: Any) -> None:
    """What nobody reads."""


def _is_dict(value: Any) -> bool:
    """A dict and nothing more: in a file an OrderedDict may have attributes, `items` for one."""
    if type(value) is OrderedDict:
        return vars(value).keys() <= {"_metadata"}
    return type(value) is dict
