"""Fold the deconvolutions of a trained model into plain layers."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from ..whitening import Whitening, forward_hooks, refuse_sharded
from .batchnorm import ChannelAffine

# Wrapper classes that depend on the layers of the wrapped model, and the attribute of that model.
# They are given by name, since importing them takes longer than importing this package.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


@torch.inference_mode(False)  # the copy can be trained later
def fuse(model: nn.Module) -> nn.Module:
    """Return a copy of a trained model with its deconvolutions folded into plain layers.

        y = W D (x - mu) + b = (W D) x + (b - W D mu)

    Each FastDeconv becomes the convolution of torch of its kind, each Delinear an `nn.Linear`. The
    new weight is W D and the new bias b - W D mu, for mu and D of the running statistics. Each
    ChannelAffine of `convert` becomes a depthwise 1 x 1 convolution, or stays if its input may be
    vectors. A layer with `input_norm` becomes a `NormalizedLayer`: an `InputNorm`, then the plain
    layer. A `ChannelDeconv` stays.
    Outputs equal those of `model.eval()` up to rounding.

    A module that several others share stays shared. Forward hooks of replaced layers are kept,
    since they may change outputs. Backward and state_dict hooks of replaced layers are dropped.

    Args:
        model: a model in evaluation mode, or a single layer; it is not changed. Code of the model
            that reads the weight of a layer directly finds W D.

    Returns:
        The copy, in evaluation mode, with the device, dtype, memory format and `requires_grad` of
        each parameter. A new bias has the `requires_grad` of its weight.

    Raises:
        ValueError: the model or a deconvolution layer is in training mode; a layer has no running
            statistics; a part of the model is wrapped (DistributedDataParallel, torch.compile) or
            sharded (fully_shard); a hook computes a layer's weight.

    Example:
        >>> model = nn.Sequential(FastDeconv(3, 8, 3), nn.ReLU())
        >>> fuse(model.eval())[0]
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    refuse_wrapped(model, "Fuse")
    for name, module in model.named_modules():
        if module.training and (not name or isinstance(module, Whitening)):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) is in training mode; fused "
                "layers use the running statistics, as evaluation does: call eval() first"
            )
    kinds = (Whitening, ChannelAffine)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, kinds)]
    copies = {id(layer): layer.fuse() for layer in layers}
    fused = copy_around(model, copies)
    for layer in layers:  # a hook that is a method of the model becomes a method of its copy
        vars(copies[id(layer)]).update(copy.deepcopy(forward_hooks(layer), copies))
    return fused


def copy_around(model: nn.Module, copies: dict[int, Any]) -> nn.Module:
    """Copy a model deeply around copies of some of its parts, given by the id of each part.

    Tensors with a graph are detached: weights that a hook of weight_norm or pruning computes anew,
    and activations that a forward has left in an attribute.
    """
    seen, todo = set[int](), [model]
    while todo:
        value: Any = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if not value.is_leaf:
                copies.setdefault(id(value), value.detach().clone())
        elif isinstance(value, Mapping):
            todo.extend(value.values())
        elif isinstance(value, list | tuple | set | deque):
            todo.extend(value)
        elif hasattr(value, "__dict__") and not isinstance(value, type | FunctionType | ModuleType):
            todo.extend(vars(value).values())
    return copy.deepcopy(model, copies)


def refuse_wrapped(model: nn.Module, verb: str) -> None:
    """Raise ValueError if a part of the model is wrapped or sharded; `verb` begins the advice."""
    for name, module in model.named_modules():
        for parent in type(module).__mro__:
            if (attribute := _WRAPPERS.get(parent.__name__)) is not None:
                raise ValueError(
                    f"{name or 'the model'} is wrapped: {type(module).__name__} is set up for the "
                    f"layers inside it. {verb} the model inside (its attribute {attribute!r})"
                )
    refuse_sharded(model, verb)
