"""Raise an error for second derivatives that autograd would compute wrongly."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., Any]


def differentiable_once(backward: Backward) -> Backward:
    """Make the backward of a `torch.autograd.Function` raise when it is differentiated.

    NOTE: torch's `once_differentiable` raises in `Tensor.backward` only. `torch.autograd.grad`
    skips the error, because no path connects it to the given inputs, and returns a wrong value.
    """

    @wraps(backward)
    def differentiate(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        sources = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        if not sources:
            return results
        single = isinstance(results, Tensor)
        guarded = (
            _RaiseInBackward.apply(result, *sources) if isinstance(result, Tensor) else result
            for result in ((results,) if single else results)
        )
        return next(guarded) if single else tuple(guarded)

    return differentiate


class _RaiseInBackward(torch.autograd.Function):
    """Return the first argument; raise in the backward pass to any argument."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            "deconvolution layers in training mode, and the layers before them, support first "
            "derivatives only: call eval() on the model before create_graph=True"
        )
