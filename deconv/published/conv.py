"""The published convolutions: of 2020, of 2019, and of the follow-up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import conv as layers
from ..ops.blocks import Blocks
from ..ops.covariance import Statistics, move_centre
from ..whitening import Matrices
from .statistics import PublishedStatistics, find_input_norm, published_block

Size = int | tuple[int, ...]


class _FastDeconv(PublishedStatistics, layers.Convolution):
    """The signature of 2020, in any number of dimensions, see `FastDeconv`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        eps: float = 1e-5,
        n_iter: int = 5,
        momentum: float = 0.1,
        block: int = 64,
        sampling_stride: int = 3,
        freeze: bool = False,
        freeze_iter: int = 100,
        **options: Any,
    ) -> None:
        if "num_groups" in options:
            raise TypeError("num_groups is of the code of 2019: subclass FastDeconv2019")
        if groups == 1:
            block = published_block(in_channels, block)
        else:
            block = max(in_channels // groups, 1)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            eps=eps,
            n_iter=n_iter,
            momentum=momentum,
            block=block,
            sampling_stride=sampling_stride,
            root="newton",
            rows_per_feature=0,
            freeze=freeze,
            freeze_iter=freeze_iter,
            **{"sync_stats": False, **options},
        )


class FastDeconv(_FastDeconv, layers.FastDeconv):
    """The published FastDeconv, for images (N, C, H, W).

    The keyword `num_groups` makes a `FastDeconv2019`. Positional calls of 2019 cannot be told from
    those of 2020, which this class takes: import `FastDeconv2019 as FastDeconv` for those.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in
            `torch.nn.Conv2d`. Without a bias, unlike there, the mean is still subtracted.
        eps: added to the diagonal of the covariance (default 1e-5), in units of variance.
        n_iter: Newton-Schulz steps, 1 to 15 (default 5).
        momentum: weight of a batch in the running statistics (default 0.1).
        block: channels whitened together (default 64): all of fewer channels, or else the greatest
            common divisor of `block` and the channels. A group of several is one block.
        sampling_stride: distance of sampled patches (default 3), in output pixels.
        freeze, freeze_iter: as in `deconv.FastDeconv`.
        options: further keywords of `deconv.FastDeconv`. As published, `sync_stats` is False by
            default: each rank has its own statistics.

    Shape:
        (N, C, H, W). Signals (N, C, L) belong to `FastDeconv` of `deconv.published.signals`: the
        weight has the shape of the kernel before it sees any input.

    Raises:
        ValueError: an argument is out of range, or the input has another shape.

    Example:
        stem = FastDeconv(3, 64, kernel_size=7, stride=2, padding=3, n_iter=15)
        y = stem(torch.randn(8, 3, 32, 32))  # (8, 64, 16, 16)

    Source: Ye et al., Network Deconvolution, ICLR 2020; `PublishedStatistics` lists differences
    from `deconv.FastDeconv`.
    """

    def __new__(cls, *args: Any, **options: Any) -> FastDeconv:
        kind = FastDeconv2019 if cls is FastDeconv and "num_groups" in options else cls
        return super().__new__(kind)

    def prepare_input(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            raise ValueError(
                f"input must be images (N, C, H, W), got shape {(*x.shape,)}: for signals "
                "(N, C, L), import FastDeconv from deconv.published.signals"
            )
        return super().prepare_input(x)


class FastDeconv1d(_FastDeconv, layers.FastDeconv1d):
    """The published `FastDeconv` for signals (N, C, L); `deconv.published.signals` has it, too."""


class FastDeconv2019(FastDeconv):
    """The FastDeconv of 2019, with its positional order.

    Three differences from 2020 are needed for equality:
    - Channels c with equal c mod G share a mean, over all pixels.
    - It is subtracted before zero padding, as if the padding were the mean. Blocks are not centred.
    - Running means have shape (1, G, 1, 1).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as in `FastDeconv`;
            there are no groups.
        eps: added to the diagonal of the covariance (default 1e-2), in units of variance.
        n_iter, momentum, sampling_stride: as in `FastDeconv`.
        num_groups: G, channels whitened together (default 16), like `block` of `FastDeconv`.
        options: as in `FastDeconv`.

    Example:
        layer = FastDeconv(64, 128, 3, padding=1, num_groups=16, eps=1e-2)  # a FastDeconv2019
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        bias: bool = True,
        eps: float = 1e-2,
        n_iter: int = 5,
        momentum: float = 0.1,
        num_groups: int = 16,
        sampling_stride: int = 3,
        **options: Any,
    ) -> None:
        for name in ("sync_stats", "process_group", "input_norm"):
            if options.get(name, "none") not in ("none", None, False):
                raise ValueError(f"the layer of 2019 takes no {name}, got {options[name]!r}")
        geometry: Any = (stride, padding, dilation, 1, bias)
        whitening: Any = (eps, n_iter, momentum, num_groups, sampling_stride)
        super().__init__(in_channels, out_channels, kernel_size, *geometry, *whitening, **options)

    def make_statistics(self, mean_taps: int, **like: Any) -> dict[str, Tensor]:
        buffers = super().make_statistics(mean_taps, **like)
        return {**buffers, "running_mean": torch.zeros(1, self.blocks.size, 1, 1, **like)}

    def fold_whitening(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Subtract the running mean, where it is used; `batch_whitening` subtracts its own."""
        if self.uses_running_stats:
            x = x - self._running_channel_mean().to(x.dtype)
        return super().fold_whitening(x)

    def batch_whitening(self, x: Tensor) -> tuple[Tensor, int | Tensor, Tensor, Matrices, Matrices]:
        means = x.mean((0, 2, 3)).unflatten(0, (-1, self.blocks.size)).mean(0)
        pooled = means.reshape(1, -1, 1, 1)
        centred = x - pooled.repeat(1, self.blocks.count, 1, 1)
        x, count, zero, observed, whiten = super().batch_whitening(centred)
        return x, count, zero, {**observed, "mean": pooled}, whiten

    def recentre(self, stats: Statistics, blocks: Blocks, axis: str) -> Statistics:
        """Return the statistics about 0: the input has lost its mean already."""
        return move_centre(stats, torch.zeros_like(stats.mean), axis, blocks)

    def running_patch_mean(self) -> Tensor | None:
        """Return 0, the mean of the centred input."""
        if self.running_mean is None:
            return None
        return self.running_mean.new_zeros(self.in_channels * self.blocks.taps)

    def _running_channel_mean(self) -> Tensor:
        assert self.running_mean is not None
        return self.running_mean.repeat(1, self.blocks.count, 1, 1)

    def fuse(self) -> nn.Module:
        """Return a depthwise convolution that subtracts the mean, and the plain convolution."""
        plain = super().fuse()
        like: Any = {"device": self.weight.device, "dtype": self.weight.dtype}
        centre = nn.Conv2d(self.in_channels, self.in_channels, 1, groups=self.in_channels, **like)
        with torch.no_grad():
            centre.weight.fill_(1)
            assert centre.bias is not None
            centre.bias.copy_(-self._running_channel_mean().flatten())
        return nn.Sequential(centre.requires_grad_(False), plain).train(self.training)


class NormalizedDeconv(FastDeconv):
    """The layer of the follow-up: `FastDeconv`, `norm_type` and `sync`.

    Args:
        in_channels to freeze_iter: as in `FastDeconv`.
        norm_type: normalisation of each sample, "none" (default), "l1norm" or "layernorm", as
            `input_norm` of `deconv.FastDeconv`.
        sync: take the batch statistics over all ranks (default False).
        options: as in `FastDeconv`.

    NOTE (differs from the published code): "l1norm" averages all elements of a sample, not every
    `sampling_stride`-th one.

    Source: Ye et al., AAAI 2022.
    """

    matrix_name = "running_cov_isqrt"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        eps: float = 1e-5,
        n_iter: int = 5,
        momentum: float = 0.1,
        block: int = 64,
        sampling_stride: int = 3,
        freeze: bool = False,
        freeze_iter: int = 100,
        norm_type: str = "none",
        sync: bool = False,
        **options: Any,
    ) -> None:
        geometry: Any = (kernel_size, stride, padding, dilation, groups, bias)
        whitening: Any = (eps, n_iter, momentum, block, sampling_stride, freeze, freeze_iter)
        options = {"input_norm": find_input_norm(norm_type), "sync_stats": sync, **options}
        super().__init__(in_channels, out_channels, *geometry, *whitening, **options)
        self.input_norm_eps = eps


class DeConv2d(layers.FastDeconv):
    """The DeConv2d of 2019: every patch, whitened as `mode` says.

    Means, covariances and running statistics are those of `deconv.FastDeconv`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as in
            `torch.nn.Conv2d`.
        eps: added to the diagonal of the covariance (default 1e-2), in units of variance.
        n_iter: Newton-Schulz steps, 1 to 15 (default 5).
        momentum: weight of a batch in the running statistics (default 0.1).
        mode: 1 (channels, then pixels), 2 (pixels) or 4 (jointly, default).
        num_groups: channels whitened together (default 16), like `block` of `FastDeconv`.
        options: further keywords of `deconv.FastDeconv`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        layer = DeConv2d(64, 128, 3, padding=1, mode=1)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        bias: bool = True,
        eps: float = 1e-2,
        n_iter: int = 5,
        momentum: float = 0.1,
        mode: int = 4,
        num_groups: int = 16,
        **options: Any,
    ) -> None:
        if mode not in (1, 2, 4):
            raise ValueError(f"mode must be 1, 2 or 4, got {mode!r}")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            bias=bias,
            mode=mode,
            block=published_block(in_channels, num_groups),
            eps=eps,
            n_iter=n_iter,
            momentum=momentum,
            sampling_stride=1,
            root="newton",
            rows_per_feature=0,
            **{"sync_stats": False, **options},
        )
