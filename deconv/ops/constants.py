"""Cache constant tensors, so that training steps compute them once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Constants = tuple[Tensor, ...]

# What each function keeps. Training on images of many sizes must not fill the memory.
KEPT, KEPT_BYTES = 128, 256 << 20


def cache_constants(make: Callable[..., Constants]) -> Callable[..., Constants]:
    """Cache the constant tensors that `make` computes from hashable arguments and `device`.

    The tensors that were used longest ago are evicted first.

    A CUDA graph reads its tensors at fixed addresses. A tensor that is used during a capture is
    therefore never freed. Under a compiler, a tensor subclass or a transform of torch.func, `make`
    runs each time, because its result may hold no numbers.
    """
    # Outside inference mode: a later backward may save the tensors.
    make_normal = torch.inference_mode(False)(make)
    known: dict[object, Constants] = {}  # in the order of their latest use
    captured: list[Constants] = []

    def find(*key: object, like: Tensor) -> Constants:
        plain = type(like) in (Tensor, torch.nn.Parameter)
        if torch.compiler.is_compiling() or not plain or _transforms():
            return make(*key, device=like.device)
        place = *key, like.device
        constants = known.pop(place, None)  # another thread then makes its own
        if constants is None:
            constants = make_normal(*key, device=like.device)
            if any(type(constant) is not Tensor for constant in constants):  # of a dispatch mode
                return constants
            _make_room(known, constants)
        known[place] = constants
        if _captures_graph(like.device):
            captured.append(constants)
        return constants

    return find


def _make_room(known: dict[object, Constants], constants: Constants) -> None:
    """Evict the constants used longest ago until further ones fit."""
    kept = list(known.items())  # in one operation, as other threads may change `known`
    total = sum(map(_count_bytes, (constants, *(each for _, each in kept))))
    for n, (place, oldest) in enumerate(kept):
        if len(kept) - n < KEPT and total <= KEPT_BYTES:
            return
        known.pop(place, None)
        total -= _count_bytes(oldest)


def _count_bytes(constants: Constants) -> int:
    return sum(constant.nbytes for constant in constants)


def _transforms() -> bool:
    """Return True inside a transform of torch.func."""
    return torch._C._are_functorch_transforms_active()


def _captures_graph(device: torch.device) -> bool:
    """Return True if a graph of the device's current stream is being captured."""
    is_capturing = getattr(getattr(torch, device.type, None), "is_current_stream_capturing", None)
    return is_capturing is not None and is_capturing()


@cache_constants
def _make_identity(side: int, scale: float, dtype: torch.dtype, device: torch.device) -> Constants:
    return (torch.eye(side, dtype=dtype, device=device) * scale,)


@cache_constants
def _make_lower_mask(side: int, device: torch.device) -> Constants:
    return (torch.ones(side, side, dtype=torch.bool, device=device).tril(),)


def find_identity(matrices: Tensor, scale: float = 1.0) -> Tensor:
    """Return `scale` times the identity (d, d) for matrices (..., d, d), in their dtype."""
    return _make_identity(matrices.shape[-1], scale, matrices.dtype, like=matrices)[0]


def find_lower_mask(matrices: Tensor) -> Tensor:
    """Return a mask (d, d) for matrices (..., d, d): True on and below the diagonal."""
    return _make_lower_mask(matrices.shape[-1], like=matrices)[0]
