"""How a step is computed: on which device, in which precision, in which memory format."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from util.training.cuda_graphs import Replayed

# Where gradients have overflowed in fp16 a step is left out, but the schedule counts it.
warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step", UserWarning)

SMALLEST_SCALE = 2.0**-14  # of fp16 losses: 30 halvings below the first
PRECISIONS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Accelerator:
    """Moves networks and batches into place, and steps in the chosen precision.

    Args:
        device: of everything.
        amp: a name of PRECISIONS: what autocast computes in; "fp16" comes with a gradient scaler,
            as its small gradients would vanish.
        channels_last: images and 4-d weights lie in memory pixel by pixel.
        compiled: networks run as torch.compile translates them.
        replays: networks train on full batches by CUDA graphs.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        amp: str = "off",
        channels_last: bool = False,
        compiled: bool = False,
        replays: bool = False,
    ) -> None:
        self.device, self.dtype = device, PRECISIONS[amp]
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self.compiled, self.replays = compiled, replays

    def to_device(self, model: nn.Module) -> nn.Module:
        return model.to(self.device, memory_format=self.memory_format)

    def compile(self, model: nn.Module) -> nn.Module:
        """The network as it is to be run; parameters and statistics stay those of `model`."""
        return torch.compile(model) if self.compiled else model

    def compile_for_training(self, model: nn.Module, shape: Sequence[int]) -> nn.Module:
        """The network as it is to be trained, on full batches of this shape and on others."""
        network = self.compile(model)
        if not self.replays:
            return network
        images = torch.zeros(shape, device=self.device).to(memory_format=self.memory_format)
        with self.autocast(cache_enabled=False):  # as a recording wants it
            return Replayed(network, images)

    def batch_to_device(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        return images, targets.to(self.device, non_blocking=True)

    def autocast(self, **more: bool) -> torch.autocast:
        """The context that a network and its loss run in."""
        enabled = self.dtype != torch.float32
        dtype = self.dtype if enabled else None
        return torch.autocast(self.device.type, dtype, enabled=enabled, **more)

    def backward(self, loss: Tensor, optimizer: Optimizer) -> Tensor:
        """Gradients of `loss`; returns the largest magnitude among them, NaN if one is NaN.

        With fp16, whose gradients may overflow, see `step`, it is 0; NaN where they still do so
        after they have been scaled down again and again.
        """
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self.scaler.is_enabled():
            lost = self.scaler.get_scale() < SMALLEST_SCALE
            return torch.tensor(math.nan if lost else 0.0, device=self.device)
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.device.type == "cpu":  # a fifth of the time there, but many launches on a GPU
            return torch.stack([end for g in gradients for end in g.aminmax()]).abs().max()
        return get_total_norm(gradients, torch.inf)

    def update(self, loss: Tensor, optimizer: Optimizer) -> None:
        """`backward` and `step`, whatever the gradients are."""
        self.backward(loss, optimizer)
        self.step(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        """One step; with fp16, none where gradients have overflowed: the next are scaled less."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave; a run of another precision has nothing to take."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)
