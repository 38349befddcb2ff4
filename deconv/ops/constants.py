"""Cache constant tensors, so that training steps compute them once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

Constants = tuple[Tensor, ...]


def cache_constants(make: Callable[..., Constants]) -> Callable[..., Constants]:
    """Cache the constant tensors that `make` computes from hashable arguments and `device`.

    A CUDA graph reads its tensors at fixed addresses. A tensor that is used during a capture is
    therefore never freed. Under a compiler, a tensor subclass or a transform of torch.func, `make`
    runs each time, because its result may hold no numbers.
    """
    # Outside inference mode: a later backward may save the tensors.
    cached = lru_cache(maxsize=128)(torch.inference_mode(False)(make))
    captured: list[Constants] = []

    def find(*key: object, like: Tensor) -> Constants:
        plain = type(like) in (Tensor, torch.nn.Parameter)
        if torch.compiler.is_compiling() or not plain or _transforms():
            return make(*key, device=like.device)
        constants = cached(*key, device=like.device)
        if any(type(constant) is not Tensor for constant in constants):  # of a dispatch mode
            cached.cache_clear()
        if _captures_graph(like.device):
            captured.append(constants)
        return constants

    return find


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
