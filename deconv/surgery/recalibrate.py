"""Running statistics afresh, for a network whose weights have changed without training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ..whitening import Whitening


@torch.no_grad()
def recalibrate(
    model: nn.Module, batches: Iterable[torch.Tensor | Sequence[torch.Tensor]], limit: int = 50
) -> int:
    """Replace the running statistics of all deconvolution layers by averages over some batches.

    For a network after surgery, or whose weights are averages of several networks': nothing is
    learned, no weight changes. Each layer whitens by its batch, as in training, and in the end has
    the plain mean of mu and of Cov over all batches that are finite, or over all its runs where it
    has several of each, while training has a mean that forgets. All other
    layers work as in evaluation (dropout drops nothing).

    Args:
        model: whose forward takes a batch; its layers' training flags are as before afterwards.
        batches: (N, ...) inputs as in training, or tuples that begin with them, as loaders give;
            they are moved to the device of the network.
        limit: batches looked at, at most.

    Returns:
        How many were.

    Raises:
        ValueError: no deconvolution layer has running statistics, there is no batch, or `limit` is
            below 1.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, Whitening) and module.track_running_stats
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no deconvolution layer to recalibrate")
    if limit < 1:
        raise ValueError(f"limit must be at least 1 batch, got {limit}")
    before = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    device, count = layers[0].weight.device, 0
    model.eval()
    try:
        for batch in batches:
            for layer in layers:
                if count == 0:  # not before: an empty loader must leave the network as it is
                    layer.reset_running_stats()
                layer.training, layer.momentum = True, None
            model((batch if isinstance(batch, torch.Tensor) else batch[0]).to(device))
            count += 1
            if count == limit:
                break
    finally:
        for module, training in before:
            module.training = training
        for layer, momentum in momenta:
            layer.momentum = momentum
    if count == 0:
        raise ValueError("there is no batch to recalibrate with")
    return count
