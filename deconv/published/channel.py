"""Published layer that whitens channels and has no weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..freezing import in_backward
from ..ops.blocks import Blocks, make_blocks, transform_along
from ..ops.covariance import mean_and_covariance, move_centre
from ..ops.inverse_sqrt import inverse_sqrt
from ..ops.patches import PatchGrid, sample
from ..ops.precision import full_precision
from ..whitening import require_all_statistics, require_positive


class ChannelDeconv(nn.Module):
    """Whiten the channels of each pixel, without a weight.

        y = D (x - mu),    D ~ (mean x x^T + eps I)^(-1/2)

    As published, D comes from the uncentred second moment, although the mean is subtracted.
    The output is therefore not white if the channels have a mean.

    Channels form n blocks that share mu and D: channel c is feature c // n of block c mod n.
    Channels beyond the last multiple of `block` are normalised by one common mean and variance.

    `fuse` keeps the layer. `recalibrate` and `whiteness` skip it. Each rank has its own statistics.

    Buffers: `running_mean1` (B, 1), `running_deconv` (B, B), `running_mean2` and `running_var`
    (1, 1), and `num_batches_tracked`. The first batch replaces the initial values.

    Args:
        block: number of channels whitened together, B.
        eps: added to the diagonal of the second moment (default 1e-2), in units of variance.
        n_iter: Newton-Schulz steps, 1 to 15 (default 5).
        momentum: weight of a batch in the running statistics (default 0.1).
        sampling_stride: distance of sampled pixels (default 3), in pixels.
        num_groups: name of `block` in the code of 2019.

    Shape:
        (N, C) or (N, C, *size), with C of at least `block`. The output has the shape of the input.

    Raises:
        ValueError: `block` and `num_groups` are both given or both missing, `block` is below 1, or
            the input has fewer channels than a block.

    Example:
        norm = ChannelDeconv(16)
        y = norm(torch.randn(8, 64, 32, 32))  # (8, 64, 32, 32)

    Source: the published code of Ye et al., Network Deconvolution, ICLR 2020.
    """

    running_mean1: Tensor
    running_deconv: Tensor
    running_mean2: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        block: int | None = None,
        eps: float = 1e-2,
        n_iter: int = 5,
        momentum: float = 0.1,
        sampling_stride: int = 3,
        *,
        num_groups: int | None = None,
    ) -> None:
        super().__init__()
        size = num_groups if block is None else block
        if size is None or None not in (block, num_groups):
            raise ValueError(f"give one of block and num_groups, got {block} and {num_groups}")
        require_positive(block=size)
        self.block, self.eps, self.n_iter, self.momentum = size, eps, n_iter, momentum
        self.sampling_stride = sampling_stride
        self.register_buffer("running_mean1", torch.zeros(self.block, 1))
        self.register_buffer("running_deconv", torch.eye(self.block))
        self.register_buffer("running_mean2", torch.zeros(1, 1))
        self.register_buffer("running_var", torch.ones(1, 1))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Whiten the channels of x by batch statistics; in evaluation, by running statistics."""
        if x.dim() < 2 or x.shape[1] < self.block:
            raise ValueError(
                f"input must be (N, C, ...) with at least {self.block} channels (block), "
                f"got shape {(*x.shape,)}: choose a smaller block"
            )
        with full_precision(x.device):
            images = x.to(torch.promote_types(x.dtype, torch.float32))
            images = images if x.dim() > 2 else images[..., None]
            whole = x.shape[1] // self.block * self.block
            blocks = make_blocks(1, whole, self.block, 1, "interleaved", shared=True, joint=True)
            first, rest = images[:, :whole], images[:, whole:].flatten(2)
            if self.training:
                mean, whiten = self._whiten_batch(first, blocks)
                rest_mean = rest.mean()
                rest_var = (rest - rest_mean).square().mean()  # NaN without channels
                if x.numel() and not in_backward():
                    moments = (rest_mean, rest_var) if rest.numel() else ()
                    self._update_running(mean, whiten, *moments)
            else:
                mean, whiten = self.running_mean1.flatten(), self.running_deconv[None]
                rest_mean, rest_var = self.running_mean2, self.running_var
            centred = first.flatten(2) - blocks.expand(mean)[:, None]
            y = transform_along("joint", centred, whiten.to(centred.dtype), blocks)
            if whole < x.shape[1]:
                y = torch.cat([y, (rest - rest_mean) * (rest_var + self.eps).rsqrt()], 1)
        return y.reshape(x.shape).to(x.dtype)

    def _whiten_batch(self, images: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """Return mu (B,) and D (1, B, B) of the sampled pixels."""
        dims = images.dim() - 2
        grid = PatchGrid((1,) * dims, (self.sampling_stride,) * dims, (1,) * dims, (0, 0) * dims)
        stats = mean_and_covariance(sample(images, grid), blocks)
        moment = move_centre(stats, torch.zeros_like(stats.mean), "joint", blocks).cov
        return blocks.pool(stats.mean), inverse_sqrt(moment, self.n_iter, "newton", self.eps)

    @torch.no_grad()
    def _update_running(self, *news: Tensor) -> None:
        """Update the running statistics; skip non-finite batches."""
        step = (self.num_batches_tracked == 0).clamp(min=self.momentum)
        olds = self.running_mean1, self.running_deconv, self.running_mean2, self.running_var
        pairs = [
            (old, new.reshape(old.shape).to(old.dtype))
            for old, new in zip(olds, news, strict=False)  # two without further channels
        ]
        usable = torch.stack([new.isfinite().all() for _, new in pairs]).all()
        for old, new in pairs:
            old.lerp_(torch.where(usable, new, old), step.to(old.dtype))
        self.num_batches_tracked += usable

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *report: Any) -> None:
        """Load a state_dict; reshape statistics whose number of elements fits.

        Incomplete statistics are an error even with strict=False.
        """
        try:
            require_all_statistics(self, state_dict, prefix)
        except ValueError as error:
            report[-1].append(f"{prefix[:-1] or 'the layer'} (ChannelDeconv): {error}")
            return
        for name, buffer in self._buffers.items():
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and buffer is not None and value.numel() == buffer.numel():
                state_dict[prefix + name] = value.reshape(buffer.shape)
        super()._load_from_state_dict(state_dict, prefix, *report)

    def extra_repr(self) -> str:
        return f"block={self.block}, eps={self.eps}, n_iter={self.n_iter}, momentum={self.momentum}"
