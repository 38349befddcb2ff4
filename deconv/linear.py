"""TODO: deconv/linear.py."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .ops.blocks import Blocks
from .ops.patches import PatchGrid, Sampling
from .whitening import Whitening, _blocks, _refuse_none_of


class Delinear(Whitening, nn.Linear):
    """A fully connected layer that whitens its input: `FastDeconv` with one tap and no patches.

    Args:
        in_features, out_features, bias: as in `torch.nn.Linear`.
        block: features whitened together: the largest divisor of `in_features` up to this.
        eps, n_iter, momentum, layout, shared, sync_stats, track_running_stats: as in `FastDeconv`.

    Shape:
        (..., in_features) -> (..., out_features); all leading dimensions count as rows.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block: int = 512,
        eps: float = 1e-2,
        n_iter: int = 5,
        momentum: float = 0.1,
        layout: str = "interleaved",
        shared: bool = True,
        sync_stats: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _refuse_none_of(in_features=in_features, out_features=out_features)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.block, self.layout, self.shared = block, layout, shared
        self.root = "newton"
        self._init_whitening(
            ("joint",),
            _blocks(1, in_features, block, 1, layout, shared, joint=True),
            mean_taps=1,
            eps=eps,
            n_iter=n_iter,
            momentum=momentum,
            sync_stats=sync_stats,
            track_running_stats=track_running_stats,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"input must have {self.in_features} features, got shape {(*x.shape,)}"
            )
        rows, weight, bias = self.fold_whitening(self.prepare_input(x))
        return F.linear(rows.reshape(x.shape), weight, bias)

    def prepare_input(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, self.in_features, 1)

    def _sampling(self, x: torch.Tensor) -> tuple[Sampling, Blocks]:
        return PatchGrid((1,), (1,), (1,), (0, 0)), self.blocks

    def fuse(self) -> nn.Linear:
        """The plain linear layer that this one is in evaluation; as `FastDeconv.fuse`."""
        return self._settle(nn.Linear(self.in_features, self.out_features, device="meta"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._whitening_repr(self.block)}"
