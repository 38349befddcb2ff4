"""Build the moving average of a model over its optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from util.errors import RunError


def build_average(model: nn.Module, decay: float) -> AveragedModel:
    """Return the exponential moving average of a model, which `update_parameters` moves by a step.

    Weights and running statistics are averaged, counters are copied. The first update copies all.

    Args:
        model: model to average, on its device.
        decay: share of the old average in the new one; about 1 / (1 - decay) steps are averaged.
    """
    move = get_ema_multi_avg_fn(decay)

    def update(averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor) -> None:
        if averages[0].is_floating_point():
            move(averages, values, count)
            return
        for average, value in zip(averages, values, strict=True):
            average.copy_(value)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def check_decay(decay: float, steps: int) -> None:
    """Raise RunError if the average of a run of `steps` would not forget its first step."""
    averaged = round(1 / (1 - decay))
    if averaged > steps:
        raise RunError(
            f"--ema {decay:g}: averages about {averaged} steps, but the run has {steps}; choose a "
            "lower decay or more epochs"
        )
