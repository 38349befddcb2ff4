"""Deconvolution with outputs of unit variance, like those of BatchNorm.

An experiment: whitened inputs alone leave the scale of the outputs to the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deconv import FastDeconv
from deconv.ops.blocks import transform_along
from deconv.ops.precision import full_precision
from models.airbench import NORM


class NormalizedDeconv(FastDeconv):
    """`FastDeconv` with each row of W D divided by the deviation of its output.

        v = sum over blocks of w Cov w^T,  w = the block's part of a row of W D
        y = W D (x - mu) / sqrt(v + output_eps) + b

    The variance v follows from W, D and the covariance of a block alone, without a pass over the
    outputs. It neglects correlations between blocks. Gradients flow through v.

    Args:
        output_eps: added to the variance of an output (default 1e-5).
        *shape, **options: as in `FastDeconv`.

    Raises:
        ValueError: the convolution has groups, or the mode does not whiten channels and pixels
            jointly.
    """

    def __init__(self, *shape: int, output_eps: float = 1e-5, **options: Any) -> None:
        super().__init__(*shape, **options)
        self.init_output_norm(output_eps)

    @classmethod
    def from_deconv(cls, layer: FastDeconv, output_eps: float = 1e-5) -> NormalizedDeconv:
        """Turn a layer into one of this class, in place."""
        layer.__class__ = cls
        layer.init_output_norm(output_eps)
        return layer

    def init_output_norm(self, output_eps: float) -> None:
        """Check the options."""
        if self.axes != ("joint",):
            raise ValueError(f"mode must be 4 or 5, got {self.mode}")
        if self.groups != 1:
            raise ValueError(f"groups must be 1, got {self.groups}")
        self.output_eps = output_eps

    def batch_whitening(self, x: Tensor) -> Any:
        result = super().batch_whitening(x)
        self._cov = result[3]["joint"]
        return result

    def fold_whitening(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias = super().fold_whitening(x)
        cov = self.running_cov_joint if self.uses_running_stats else self._cov
        self._cov = None
        with full_precision(x.device):
            return x, *self.normalize(weight, bias, cov)

    def normalize(self, weight: Tensor, bias: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and bias with outputs of unit variance, the learned bias unscaled."""
        scale = self.output_variance(weight, cov).add(self.output_eps).rsqrt()
        learned = 0 if self.bias is None else self.bias
        return weight * scale[:, None, None, None], (bias - learned) * scale + learned

    def output_variance(self, weight: Tensor, cov: Tensor) -> Tensor:
        """Return the variance (out,) of each row of the folded weight W D."""
        maps = weight.reshape(len(weight), -1, 1)  # out C*T 1
        return (maps * transform_along("joint", maps, cov, self.blocks)).sum((1, 2))

    def _fold_running(self) -> tuple[Tensor, Tensor]:  # of `fuse`
        weight, bias = super()._fold_running()
        with torch.no_grad():
            return self.normalize(weight, bias, self.running_cov_joint)


def normalize_behind_pooling(group: nn.Sequential) -> None:
    """Give all inputs of GELU in a group of airbench unit variance, in place.

    Pooling moves the mean and the variance, so BatchNorm without a scale follows it. The second
    deconvolution, which no pooling follows, becomes a `NormalizedDeconv`.
    """
    conv, _, _, _, second, *_ = group
    group[2] = nn.BatchNorm2d(conv.out_channels, **NORM)
    group[2].weight.requires_grad_(False)
    NormalizedDeconv.from_deconv(second)
