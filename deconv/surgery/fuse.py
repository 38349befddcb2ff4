"""A trained network as plain convolutions and linear layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..whitening import Whitening, forward_hooks
from .batchnorm import ChannelAffine

# Modules that are set up for the very layers of the network in them, and where they keep it. By
# name: importing the classes would take longer than this package does.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


@torch.inference_mode(False)  # what it makes may be trained later
def fuse(model: nn.Module) -> nn.Module:
    """A copy of a trained network in which deconvolution is folded into plain layers.

        y = W D (x - mu) + b = (W D) x + (b - W D mu)

    Every FastDeconv becomes the convolution of torch that it stands for (an `nn.Conv2d`, say) and
    every Delinear an `nn.Linear` (`layer.fuse()` of each), with W D as weight and b - W D mu as
    bias, mu and D the running statistics; ChannelAffine, which `convert` leaves where it must,
    becomes a convolution of single pixels. Outputs are those of `model.eval()` up to rounding. What
    occurs twice in the network is replaced once, and everything else is what `copy.deepcopy` makes
    of it, hooks included. Of the layers that are replaced, forward hooks come along, as they may
    change outputs; backward hooks and those of state_dict do not. The input is left as it is.

    Args:
        model: in evaluation mode; may itself be a layer, and may have nothing to fuse. Code that
            reads a layer's weight in any other way than by calling the layer finds W D there.

    Returns:
        The copy, in evaluation mode, with the devices, dtypes, memory formats and `requires_grad`
        of the input; a bias that a layer did not have follows its weight in these.

    Raises:
        ValueError: the model or one of its deconvolution layers is in training mode; a part of it
            is wrapped (DistributedDataParallel, torch.compile); a hook computes a layer's weight.
    """
    refuse_wrapped(model, "Fuse")
    for name, module in model.named_modules():
        if module.training and (not name or isinstance(module, Whitening)):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) is in training mode; fused "
                "layers have the running statistics, as in evaluation: call eval() first"
            )
    kinds = (Whitening, ChannelAffine)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    copies = {id(layer): layer.fuse() for layer in layers}
    fused = copy_around(model, copies)
    for layer in layers:  # a hook that is a method of the model becomes one of its copy
        vars(copies[id(layer)]).update(copy.deepcopy(forward_hooks(layer), copies))
    return fused


def copy_around(model: nn.Module, copies: dict[int, Any]) -> nn.Module:
    """A deep copy of a model in which what `copies` has by its id counts as copied already."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                # Of an old weight_norm or of pruning, whose hook will compute it anew.
                copies.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(model, copies)


def refuse_wrapped(model: nn.Module, what: str) -> None:
    """Raise ValueError where a part of the model is wrapped; `what`: Fuse, Convert, ..."""
    for name, module in model.named_modules():
        for parent in type(module).__mro__:
            if parent.__name__ in _WRAPPERS:
                raise ValueError(
                    f"{name or 'the model'} is wrapped: {type(module).__name__} is set up for the "
                    f"layers that it was made with. {what} the network in it (its attribute "
                    f"{_WRAPPERS[parent.__name__]!r})"
                )
