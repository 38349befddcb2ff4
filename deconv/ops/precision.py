"""Compute products in full float32 precision, whatever precision torch is set to.

With `torch.set_float32_matmul_precision("high")` and similar settings, torch rounds the factors of
a product to 10 or 7 bits. Newton-Schulz amplifies this error at every step. After ten steps its
result is useless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from threading import Lock
from typing import Any, TypeVar, cast

import torch

BACKENDS: Any = torch.backends  # mypy does not know all of its attributes
# Settings of cuBLAS products, oneDNN products and oneDNN convolutions.
SETTINGS = BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv
REDUCED = ("tf32", "bf16")
DEVICES = "cpu", "cuda"  # the settings apply to these devices, and both support float64
Context = AbstractContextManager[Any]
Method = TypeVar("Method", bound=Callable[..., Any])

# The settings are global. Of all threads, the first context sets and the last one restores them.
_lock = Lock()
_contexts = 0
_restore: Callable[[], None] = lambda: None


def full_precision(device: torch.device) -> Context:
    """Return a context without autocast that computes products as `full_products` does.

    Squares overflow in half precision. Without autocast, nothing is entered: torch cannot load an
    exported program that enters autocast.
    """
    off = torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()
    return full_products(off)


def autocasts(device: torch.device) -> bool:
    """Return True if autocast is on; it casts every floating-point type except float64."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def full_products(context: Context | None = None) -> Context:
    """Extend `context` to compute float32 products in full precision.

    Compiled code keeps the setting of torch, because a graph cannot change it.
    """
    context = context or nullcontext()
    if torch.compiler.is_compiling():
        return context
    with _lock:
        return _hold(context) if _contexts or is_reduced() else context


def in_full_products(backward: Method) -> Method:
    """Run the backward pass of a Function inside `full_products`."""

    @wraps(backward)
    def decorated(*args: Any) -> Any:
        with full_products():
            return backward(*args)

    return cast(Method, decorated)


def is_reduced() -> bool:
    """Return True if torch may round the factors of float32 products."""
    read = torch._C._get_fp32_precision_getter  # ten times faster than `fp32_precision`
    values = read("cuda", "matmul"), read("mkldnn", "matmul"), read("mkldnn", "conv")  # SETTINGS
    return any(value in REDUCED for value in values)


# `torch.compiler.assume_constant_result` does the same, but imports the compiler for seconds.
is_reduced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def rounds_compiled(device: torch.device) -> bool:
    """Return True while torch compiles code whose float32 products it may round."""
    compiles = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiles and device.type in DEVICES and is_reduced()


def is_raised() -> bool:
    """Return True if `full_products` is active and overrides the setting of torch.

    Autograd runs backward passes outside this context. A product then needs a Function whose
    backward enters the context again. Transforms of torch.func do not support such a Function.
    """
    if torch.compiler.is_compiling() or not _contexts:
        return False
    return not torch._C._are_functorch_transforms_active()


@contextmanager
def _hold(context: Context) -> Iterator[None]:
    """Set full precision while any thread is inside this context."""
    global _contexts, _restore
    with _lock:
        if not _contexts:
            _restore = _raise_settings()
        _contexts += 1
    try:
        with context:
            yield
    finally:
        with _lock:
            _contexts -= 1
            if not _contexts:
                _restore()


def _raise_settings() -> Callable[[], None]:
    """Set full precision and return a function that restores the settings."""
    before = [(setting, _read_own_value(setting)) for setting in SETTINGS]
    for setting in SETTINGS:
        setting.fp32_precision = "ieee"
    legacy = torch.get_float32_matmul_precision()  # raises for some values of the other settings
    torch.set_float32_matmul_precision("highest")  # TunableOp raises if old and new setting differ

    def restore() -> None:
        torch.set_float32_matmul_precision(legacy)
        for setting, own in before:
            setting.fp32_precision = own

    return restore


def _read_own_value(setting: Any) -> str:
    """Return the value of a setting, or "none" if the setting inherits its value."""
    value = setting.fp32_precision
    setting.fp32_precision = "none"
    return "none" if setting.fp32_precision == value else value
