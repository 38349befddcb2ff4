"""Full float32 precision of all products, whatever precision torch is set to.

`torch.set_float32_matmul_precision("high")` and its relatives let a product round its factors to
10 or 7 bits. Newton-Schulz multiplies such an error at every step: ten steps are lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from threading import Lock
from typing import Any, TypeVar, cast

import torch

BACKENDS: Any = torch.backends  # mypy does not see all of its attributes
# What torch may round: products on a GPU, products of oneDNN, convolutions of oneDNN.
SETTINGS = BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv
REDUCED = ("tf32", "bf16")
DEVICES = "cpu", "cuda"  # that the settings concern, and that have float64
Context = AbstractContextManager[Any]
Method = TypeVar("Method", bound=Callable[..., Any])

# The settings are global: the first context of all threads changes, the last one restores them.
_lock = Lock()
_contexts = 0
_restore: Callable[[], None] = lambda: None


def full_precision(device: torch.device) -> Context:
    """Disable autocast where it is on, and compute products as in `full_products`.

    Squares overflow in half precision. An exported program with a context of autocast cannot be
    loaded again.
    """
    off = torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()
    return full_products(off)


def autocasts(device: torch.device) -> bool:
    """Return True if autocast is on, which casts all floating-point types but float64."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def full_products(context: Context | None = None) -> Context:
    """Enter `context`, and compute float32 products in full where torch is set to less.

    Compiled code keeps the setting of torch, as no graph can change it.
    """
    context = context or nullcontext()
    if torch.compiler.is_compiling():
        return context
    with _lock:
        return _hold(context) if _contexts or is_reduced() else context


def in_full_products(backward: Method) -> Method:
    """Decorate the backward pass of a Function by `full_products`."""

    @wraps(backward)
    def decorated(*args: Any) -> Any:
        with full_products():
            return backward(*args)

    return cast(Method, decorated)


def is_reduced() -> bool:
    """Return True if torch may round the factors of some float32 products."""
    read = torch._C._get_fp32_precision_getter  # ten times faster than `fp32_precision`
    values = read("cuda", "matmul"), read("mkldnn", "matmul"), read("mkldnn", "conv")  # SETTINGS
    return any(value in REDUCED for value in values)


# As `torch.compiler.assume_constant_result` does, which imports the compiler, in seconds.
is_reduced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def rounds_compiled(device: torch.device) -> bool:
    """Return True in compiled code whose float32 products torch may round."""
    compiles = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiles and device.type in DEVICES and is_reduced()


def is_raised() -> bool:
    """Return True inside `full_products` where torch is set to less.

    Gradients are computed outside: a product then needs a Function that enters the context again.
    torch.func takes no such Function.
    """
    if torch.compiler.is_compiling() or not _contexts:
        return False
    return not torch._C._are_functorch_transforms_active()


@contextmanager
def _hold(context: Context) -> Iterator[None]:
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
    """Set full precision, and return the function that restores the settings."""
    before = [(setting, _find_own(setting)) for setting in SETTINGS]
    for setting in SETTINGS:
        setting.fp32_precision = "ieee"
    legacy = torch.get_float32_matmul_precision()  # raises for some of the other settings
    torch.set_float32_matmul_precision("highest")  # TunableOp raises where the two disagree

    def restore() -> None:
        torch.set_float32_matmul_precision(legacy)
        for setting, own in before:
            setting.fp32_precision = own

    return restore


def _find_own(setting: Any) -> str:
    """Return the value of a setting, or "none" where it inherits the value."""
    value = setting.fp32_precision
    setting.fp32_precision = "none"
    return "none" if setting.fp32_precision == value else value
