"""Build the moving average of a model over its optimizer steps."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from util.errors import RunError


class ExponentialAverage(AveragedModel):
    """Exponential moving average of a model, which `update_parameters` moves by a step.

    Weights and running statistics are averaged, counters are copied. The first update copies all.
    An update in torch's class waits for the GPU, because the class moves `n_averaged` there.

    Args:
        model: model to average, on its device.
        decay: share of the old average in the new one; about 1 / (1 - decay) steps are averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards `model`."""
        tensors = ([*each.parameters(), *each.buffers()] for each in (self.module, model))
        is_first = self.n_averaged == 0
        averaged, copied = [], []
        for average, value in zip(*tensors, strict=True):
            is_copied = is_first or not average.is_floating_point()
            (copied if is_copied else averaged).append((average, value))
        if averaged:
            averages, values = zip(*averaged, strict=True)
            torch._foreach_lerp_(averages, values, 1 - self.decay)
        if copied:
            torch._foreach_copy_(*zip(*copied, strict=True))
        self.n_averaged += 1


def check_decay(decay: float, steps: int) -> None:
    """Raise RunError if the average of a run of `steps` would not forget its first step."""
    averaged = round(1 / (1 - decay))
    if averaged > steps:
        raise RunError(
            f"--ema {decay:g}: averages about {averaged} steps, but the run has {steps}; choose a "
            "lower decay or more epochs"
        )
