"""Squeeze and excitation (Hu et al., 2018): each channel scaled by what the whole picture says."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SqueezeExcitation(nn.Module):
    """x * sigmoid(two linear maps of its global average): (N, C, H, W) -> (N, C, H, W).

    The linear maps are plain in either kind of network: BatchNorm has no place in them that
    deconvolution could take. NOTE (differs from the published code): there they were whitened.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        scale = self.excite(F.relu(self.squeeze(pooled))).sigmoid()
        return x * scale[:, :, None, None]
