"""Capture a training step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from util.errors import RunError
from util.training.hooks import ModelHooks, enter_batch


def check_messages(model: nn.Module, processes: int) -> None:
    """Raise RunError if layers share statistics between several processes in the forward.

    NCCL requires that all ranks replay a captured message, or that none does. The last batch of an
    epoch and bad images give one rank a full part and another rank a smaller one.
    """
    shares = any(getattr(layer, "sync_stats", False) for layer in model.modules())
    if shares and processes > 1:
        raise RunError(
            f"--cuda-graphs True: layers share statistics between {processes} processes, and their "
            "messages are not captured; add --sync-stats False or leave --cuda-graphs out"
        )


class _Step(nn.Sequential):
    """Forward of a model in its batch context, which a graph captures with it."""

    def __init__(self, model: nn.Module, hooks: ModelHooks) -> None:
        super().__init__(model)
        self.batch_context = hooks.batch_context

    def forward(self, images: Tensor) -> Tensor:
        with enter_batch(self.batch_context, 0, len(images)):
            return super().forward(images)


class GraphedModel(nn.Module):
    """Model that trains on full batches by CUDA graphs and runs as usual otherwise.

    Without graphs, each launch of whitening's many small kernels takes longer than the kernel.

    A graph has a fixed control flow. Each phase of the model has its own graph, which is captured
    before the first step in this phase. A replay runs no Python code, so `hooks.advance` counts it.

    In several processes, wrap this module by DistributedDataParallel. Graphs then contain no
    message: gradients are averaged after the replayed backward ("Partial-network capture",
    https://docs.pytorch.org/docs/stable/notes/cuda.html#usage-with-distributeddataparallel).

    Args:
        model: on its GPU. A capture leaves buffers, phase and random state unchanged.
        images: a full batch of this process, of any content; later batches are copied into its
            memory.
        hooks: hooks of the model; `phase`, `advance` and `hold` are used.

    Raises:
        RunError: the model cannot be captured, for example because it waits for the GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        hooks: ModelHooks = ModelHooks(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.model, self.shape, self.hooks = model, images.shape, hooks
        self.graphs: dict[Hashable, Callable[[Tensor], Tensor]] = {}
        self.graphs[hooks.phase(model)] = self._capture(images)

    def forward(self, images: Tensor) -> Tensor:
        is_full = self.training and torch.is_grad_enabled() and images.shape == self.shape
        if not is_full:
            return self.model(images)
        phase = self.hooks.phase(self.model)
        if phase not in self.graphs:
            self.graphs[phase] = self._capture(torch.zeros_like(images))
        logits = self.graphs[phase](images)
        self.hooks.advance(self.model)
        return logits

    def _capture(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        """Capture the next step of the model as a graph whose input memory is `images`."""
        # The capture replaces `forward` of the wrapper; `model` keeps its own for other batches.
        step = _Step(self.model, self.hooks).train()
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        device, kind = images.device, images.device.type
        precision = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        try:
            with (
                torch.random.fork_rng([device] if images.is_cuda else []),
                # A capture needs autocast without its cache.
                torch.autocast(kind, *precision, cache_enabled=False),
                self.hooks.hold(),
            ):
                graph = torch.cuda.make_graphed_callables(step, (images,))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = f"steps cannot be captured ({str(error).splitlines()[0]})"
            raise RunError(f"{reason}: train with --cuda-graphs False") from error
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(value)
        return graph
