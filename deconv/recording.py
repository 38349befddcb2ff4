"""Record layers of this package in `torch.fx` graphs."""

from __future__ import annotations

from typing import Any

from torch import nn


def record_call(layer: nn.Module, *args: Any) -> Any:
    """Record a call of the layer in a `torch.fx` graph as one node, as for layers of torch.

    Tracers of torch and torchvision trace into a layer unless its class is defined in `torch.nn`.
    """
    tracer = args[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, {})
