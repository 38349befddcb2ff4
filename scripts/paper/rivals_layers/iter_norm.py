"""IterNorm: whiten the outputs of a convolution by Newton's iteration.

Huang et al., Iterative Normalization: Beyond Standardization towards Efficient Whitening, CVPR
2019. Written from the published rule.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class IterNorm(nn.Module):
    """Whiten groups of channels over images and pixels, then scale and shift each channel.

        S = Cov(x) + eps I,  P_0 = I,  P_k = 1.5 P_(k-1) - 0.5 P_(k-1)^3 S / tr(S)
        y = weight * P_T (x - mean) / sqrt(tr(S)) + bias

    (N, C, H, W) -> (N, C, H, W).

    In training, gradients flow through mean and S. Evaluation uses running averages of the mean and
    of the whitening matrix, as published.

    Args:
        channels: C.
        group: channels whitened together; all if C is smaller (default 64).
        steps: T, of Newton's iteration (default 5).
        eps: added to the diagonal, in units of variance (default 1e-5).
        momentum: weight of a batch in the running averages (default 0.1).

    Raises:
        ValueError: `group` does not divide `channels`.
    """

    running_mean: Tensor
    running_whiten: Tensor

    def __init__(
        self,
        channels: int,
        *,
        group: int = 64,
        steps: int = 5,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.group, self.steps = min(group, channels), steps
        self.eps, self.momentum = eps, momentum
        if channels % self.group:
            raise ValueError(f"channels must be a multiple of group {group}, got {channels}")
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        shape = channels // self.group, self.group  # G d
        self.register_buffer("running_mean", torch.zeros(*shape, 1))
        self.register_buffer("running_whiten", torch.eye(self.group).repeat(shape[0], 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # squares need float32
            return self.normalize(x.to(self.running_mean.dtype)).to(x.dtype)

    def normalize(self, x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).reshape(*self.running_mean.shape[:2], -1)  # G d M
        if self.training:
            mean = rows.mean(2, keepdim=True)
            whiten = self.find_whitening(rows - mean)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_whiten.lerp_(whiten, self.momentum)
        else:
            mean, whiten = self.running_mean, self.running_whiten
        y = whiten @ (rows - mean)
        y = y.reshape(x.shape[1], len(x), *x.shape[2:]).transpose(0, 1)
        return y * self.weight[:, None, None] + self.bias[:, None, None]

    def find_whitening(self, rows: Tensor) -> Tensor:
        """Return P_T / sqrt(tr(S)), (G, d, d), of centred rows (G, d, M)."""
        identity = torch.eye(self.group, dtype=rows.dtype, device=rows.device)
        cov = rows @ rows.mT / rows.shape[2] + self.eps * identity
        trace = cov.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        cov, P = cov / trace, identity.expand_as(cov)
        for _ in range(self.steps):
            P = 1.5 * P - 0.5 * P @ P @ P @ cov
        return P * trace.rsqrt()
