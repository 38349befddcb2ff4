"""A fully connected layer that whitens its input."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, fx, nn
from torch.nn import functional as F

from .ops.blocks import Blocks, make_blocks
from .ops.inverse_sqrt import ROOTS
from .ops.patches import PatchGrid, Sampling
from .recording import record_call
from .whitening import Whitening, require_choice, require_positive


class Delinear(Whitening, nn.Linear):
    """Linear layer that whitens its input: `FastDeconv` with one tap, rows as patches.

        y = W D (x - mu) + b = (W D) x + (b - W D mu),    D ~ (Cov(x) + eps I)^(-1/2)

    Args:
        in_features, out_features, bias: as in `torch.nn.Linear`.
        block: features whitened together (default 512). The features form blocks of the largest
            divisor of `in_features` up to `block`.
        root: algorithm that computes D (default "resolvent"), see `inverse_sqrt`. "newton" and
            "resolvent" work on the smaller side where rows are fewer than half the features.
            "newton": `n_iter` steps of Newton-Schulz, as published.
            "resolvent": equal to "newton" within 0.75 %.
            "cholesky": as in `FastDeconv`; less accurate in wide blocks.
        eps, n_iter, momentum, layout, shared, sync_stats, process_group, track_running_stats: as in
            `FastDeconv`.
        input_norm, freeze, freeze_iter: as in `FastDeconv`; a sample is a row.
        device, dtype: of the parameters, as in `torch.nn.Linear`.

    Shape:
        (..., in_features) -> (..., out_features). All leading dimensions count as rows.

    Raises:
        ValueError: an argument is out of range, or the input has another number of features.

    Example:
        head = Delinear(512, 10)
        logits = head(torch.randn(128, 512))  # (128, 10)

    Source: Ye et al., Network Deconvolution, ICLR 2020, section 3.1.
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
        momentum: float | None = 0.1,
        root: str = "resolvent",
        layout: str = "interleaved",
        shared: bool = True,
        sync_stats: bool = True,
        process_group: distributed.ProcessGroup | None = None,
        track_running_stats: bool = True,
        input_norm: str = "none",
        freeze: bool = False,
        freeze_iter: int = 100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_positive(in_features=in_features, out_features=out_features)
        require_choice("root", root, ROOTS)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.block, self.layout, self.shared = block, layout, shared
        self.root, self.sample_dims = root, 1
        self.init_whitening(
            ("joint",),
            make_blocks(1, in_features, block, 1, layout, shared, joint=True),
            mean_taps=1,
            eps=eps,
            n_iter=n_iter,
            momentum=momentum,
            sync_stats=sync_stats,
            process_group=process_group,
            track_running_stats=track_running_stats,
            input_norm=input_norm,
            freeze=freeze,
            freeze_iter=freeze_iter,
        )

    def forward(self, input: Tensor) -> Tensor:  # named as in torch
        """Whiten the rows and apply the weight, as one linear layer with a folded weight."""
        if isinstance(input, fx.Proxy):
            return record_call(self, input)
        self.begin_forward(input)
        rows, weight, bias = self.fold_whitening(self.prepare_input(input))
        return F.linear(rows.reshape(input.shape), weight, bias)

    def prepare_input(self, x: Tensor) -> Tensor:
        """Return x (..., C), normalised, as images of one pixel, (M, C, 1)."""
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"input must have {self.in_features} features, got shape {(*x.shape,)}"
            )
        return self.normalize_input(x).reshape(-1, self.in_features, 1)

    def choose_patches(self, x: Tensor) -> tuple[Sampling, Blocks]:
        """Return every row."""
        return PatchGrid((1,), (1,), (1,), (0, 0)), self.blocks

    def fuse(self) -> nn.Module:
        """Return the plain linear layer that equals this one in evaluation; see `FastDeconv`."""
        return self._fuse_into(nn.Linear(self.in_features, self.out_features, device="meta"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._whitening_repr(self.block)}, root={self.root}"
