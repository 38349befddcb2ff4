"""Device, precision and memory format of training steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from util.training.cuda_graphs import GraphedModel
from util.training.hooks import ModelHooks

# An fp16 step whose gradients overflow is skipped, but the schedule counts the step.
warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step", UserWarning)

SMALLEST_SCALE = 2.0**-14  # of fp16 losses: 30 halvings below the initial scale
PRECISIONS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Accelerator:
    """Moves models and batches to the device, and steps in the chosen precision.

    Args:
        device: device of model and batches.
        amp: key of PRECISIONS, the dtype of autocast; "fp16" scales the loss.
        channels_last: store images and 4-d weights in channels_last format.
        compiled: run models through torch.compile.
        cuda_graphs: train on full batches by CUDA graphs.
        clip_grad: largest norm of all gradients together; None: no limit.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        amp: str = "off",
        channels_last: bool = False,
        compiled: bool = False,
        cuda_graphs: bool = False,
        clip_grad: float | None = None,
    ) -> None:
        self.device, self.dtype = device, PRECISIONS[amp]
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self.compiled, self.cuda_graphs = compiled, cuda_graphs
        self.clip_grad = clip_grad

    @property
    def reads_late(self) -> bool:
        """True if results of a step are read during the next step, so that a GPU need not idle."""
        return self.device.type == "cuda"

    def to_device(self, model: nn.Module) -> nn.Module:
        """Move `model` to the device, in the chosen memory format."""
        return model.to(self.device, memory_format=self.memory_format)

    def batch_to_device(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Move a batch to the device, images in the chosen memory format."""
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        return images, targets.to(self.device, non_blocking=True)

    def compile(self, model: nn.Module) -> nn.Module:
        """Return `model` compiled if asked; both share parameters and statistics."""
        return torch.compile(model) if self.compiled else model

    def compile_for_training(
        self,
        model: nn.Module,
        shape: Sequence[int],
        hooks: ModelHooks = ModelHooks(),  # noqa: B008 - frozen
    ) -> nn.Module:
        """Return `model` compiled or captured for training on batches of `shape` (N, C, H, W)."""
        compiled = self.compile(model)
        if not self.cuda_graphs:
            return compiled
        images = torch.zeros(shape, device=self.device).to(memory_format=self.memory_format)
        with self.autocast():
            return GraphedModel(compiled, images, hooks)

    def autocast(self) -> torch.autocast:
        """Return the context in which model and loss run."""
        enabled = self.dtype != torch.float32
        dtype = self.dtype if enabled else None
        return torch.autocast(self.device.type, dtype, enabled=enabled)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to those of the parameters."""
        self.scaler.scale(loss).backward()

    def largest_gradients(self, optimizer: Optimizer) -> Tensor:
        """Return the largest magnitude of each gradient, NaN if a value of it is NaN.

        With fp16, gradients may overflow (see `step`), and the result is 0. Once the loss scale
        falls below SMALLEST_SCALE, the result is not finite.

        Returns:
            (P,), for the P parameters of `list_trained`.
        """
        gradients = _gradients(optimizer)
        if self.device.type == "cpu":  # faster there, but more kernel launches on a GPU
            ends = torch.stack([end for g in gradients for end in g.aminmax()])
            largest = ends.abs().reshape(-1, 2).amax(1)
        else:
            largest = torch.stack(torch._foreach_norm(gradients, torch.inf))
        if not self.scaler.is_enabled():
            return largest
        scale = self.scaler.scale(torch.ones((), device=self.device))
        lost = largest.masked_fill(largest.isfinite().all(), math.nan)
        return torch.where(scale < SMALLEST_SCALE, lost, 0.0)

    def step(self, optimizer: Optimizer, is_bad: Tensor) -> None:
        """Clip the gradients and update the parameters, unless the step `is_bad`.

        fp16 skips overflowed gradients as well and halves the loss scale.

        Args:
            optimizer: a fused one reads `is_bad` on the GPU. Any other waits for the GPU here.
            is_bad: () bool on the device. If True, parameters and state of the optimizer stay as
                they are.
        """
        self.scaler.unscale_(optimizer)
        if self.clip_grad is not None:
            clip_grad_norm_(_parameters(optimizer), self.clip_grad)
        if self.scaler.is_enabled():
            is_bad = is_bad | ~get_total_norm(_gradients(optimizer), torch.inf).isfinite()
        if optimizer.defaults.get("fused"):
            optimizer.found_inf, optimizer.grad_scale = is_bad.float(), None
            optimizer.step()
            del optimizer.found_inf, optimizer.grad_scale
        elif not is_bad:
            optimizer.step()
        self.scaler.update()

    def update(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Take a whole step on `loss`, unless a gradient is not finite."""
        optimizer.zero_grad()
        self.backward(loss)
        self.step(optimizer, ~self.largest_gradients(optimizer).isfinite().all())


def list_trained(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters that have a gradient."""
    return [parameter for parameter in _parameters(optimizer) if parameter.grad is not None]


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [parameter.grad for parameter in list_trained(optimizer)]


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
