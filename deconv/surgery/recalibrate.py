"""Average the running statistics of a model anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from ..whitening import Whitening


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    limit: int = 50,
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> int:
    """Replace the running statistics of all deconvolution layers by averages over some batches.

    Use it after surgery, or after averaging the weights of several models. Weights do not change.
    Each layer whitens by its batch, as in training. Its new statistics are the plain mean of mu and
    of Cov over all finite batches. If a forward calls a layer several times, each call counts as a
    batch. Other layers work as in evaluation; dropout, for example, drops nothing. A layer that no
    finite batch reaches keeps its statistics. An error leaves all statistics as they were.

    With several ranks, layers share statistics as in training: inside DistributedDataParallel, with
    a `process_group` and in `batch_share`. All ranks must then call this function with equally many
    batches; a single rank would wait forever. Without sharing, each rank averages over its own
    batches. A model sharded by `fully_shard` needs all ranks in any case.

    Args:
        model: a model whose forward takes a batch; training flags are restored afterwards.
        batches: inputs (N, ...) as in training, or tuples that start with inputs. They are moved to
            the device of the model.
        limit: maximum number of batches (default 50).
        forward: function of (model, batch) that moves a batch to the device and runs the model
            (default: call the model with the first tensor of the batch).

    Returns:
        The number of batches used.

    Raises:
        ValueError: no deconvolution layer has running statistics, there is no finite batch, or
            `limit` is below 1.
        TypeError: a batch contains no tensor where expected, and `forward` is None.

    Example:
        >>> model = nn.Sequential(FastDeconv(3, 8, 3), nn.ReLU())
        >>> recalibrate(model, torch.randn(4, 16, 3, 9, 9))
        4
        >>> named = [{"pixels": torch.randn(16, 3, 9, 9)}]
        >>> recalibrate(model, named, forward=lambda model, batch: model(batch["pixels"]))
        1
    """
    layers: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, Whitening) and module.track_running_stats
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no deconvolution layer")
    if limit < 1:
        raise ValueError(f"limit must be at least 1 batch, got {limit}")
    flags = [(module, module.training) for module in model.modules()]
    before = [
        (
            layer,
            layer.momentum,
            layer.freeze,
            [buffer.clone() for buffer in layer.buffers(recurse=False)],
        )
        for layer in layers
    ]
    device, count, reached = layers[0].weight.device, 0, list[bool]()
    model.eval()
    try:
        for layer in layers:
            layer.freeze = False  # every batch updates the statistics, and none counts as a step
            layer.reset_running_stats()
        for batch in batches:
            for layer in layers:
                layer.training, layer.momentum = True, None
            if forward is not None:
                forward(model, batch)
            else:
                model(find_input(batch).to(device))
            count += 1
            if count == limit:
                break
        reached = [bool(layer.num_batches_tracked > 0) for layer in layers]
    finally:
        for module, training in flags:
            module.training = training
        for (layer, momentum, freeze, buffers), keeps_new in zip_longest(before, reached):
            layer.momentum, layer.freeze = momentum, freeze
            if not keeps_new:
                for buffer, old in zip(layer.buffers(recurse=False), buffers, strict=True):
                    buffer.copy_(old)
    if not any(reached):
        raise ValueError(f"there is no finite batch among {count} batches")
    return count


def find_input(batch: Any) -> torch.Tensor:
    """Return the input of a batch, its first part.

    Raises:
        TypeError: the batch has no such part.
    """
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(first, torch.Tensor):
        raise TypeError(
            "a batch must be a tensor, or a tuple or list that starts with one, got "
            f"{type(batch).__name__}: pass forward=lambda model, batch: ... to run the model on it"
        )
    return first
