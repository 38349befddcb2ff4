"""Backward passes that refuse a second derivative instead of omitting a part of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., Any]


def differentiable_once(backward: Backward) -> Backward:
    """Wrap the backward of a `torch.autograd.Function`: a second derivative through it raises.

    NOTE: `once_differentiable` of torch raises only in `Tensor.backward`. `torch.autograd.grad`
    skips its error, because no path leads from there to the given inputs: it returns a wrong value.
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
        refused = (
            _Refusal.apply(result, *sources) if isinstance(result, Tensor) else result
            for result in ((results,) if single else results)
        )
        return next(refused) if single else tuple(refused)

    return differentiate


class _Refusal(torch.autograd.Function):
    """Identity of the first argument, whose gradient with respect to any argument raises."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            "a deconvolution layer in training is differentiable once with respect to its input, "
            "and so are the layers before it: call eval() before create_graph=True"
        )
