"""Average the running statistics of a model anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..whitening import Whitening


@torch.no_grad()
def recalibrate(
    model: nn.Module, batches: Iterable[torch.Tensor | Sequence[torch.Tensor]], limit: int = 50
) -> int:
    """Replace the running statistics of all deconvolution layers by averages over some batches.

    Use it after surgery, or after averaging the weights of several models. Weights do not change.
    Each layer whitens by its batch, as in training. Its new statistics are the plain mean of mu and
    of Cov over all finite batches, or over all its calls if a forward calls it several times.
    Other layers work as in evaluation; dropout, for example, drops nothing.

    Args:
        model: a model whose forward takes a batch; training flags are restored afterwards.
        batches: (N, ...) inputs as in training, or tuples that start with them, as loaders yield.
            They are moved to the device of the model.
        limit: maximum number of batches.

    Returns:
        The number of batches used.

    Raises:
        ValueError: no deconvolution layer has running statistics, there is no batch, or `limit` is
            below 1.

    Example:
        >>> model = nn.Sequential(FastDeconv(3, 8, 3), nn.ReLU())
        >>> recalibrate(model, torch.randn(4, 16, 3, 9, 9))
        4
    """
    layers: list[Any] = [
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
                if count == 0:  # an empty loader must not change the model
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
