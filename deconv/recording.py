"""Record modules of this package in graphs of `torch.fx`."""

from __future__ import annotations

from typing import Any

from torch import nn


def record_call(layer: nn.Module, *args: Any) -> Any:
    """Record a call of the layer in the graph of `torch.fx`, as of any layer of torch.

    The tracers of torch and torchvision ask for the module of a class, and would trace its forward.
    """
    tracer = args[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, {})
