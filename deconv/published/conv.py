"""Convolutions of the published code of 2020, of 2019 and of the follow-up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import conv as layers
from ..ops.blocks import Blocks, make_blocks
from ..ops.covariance import Statistics, move_centre
from ..sync import find_ddp_group
from ..whitening import Matrices, forward_hooks, refuse_sharded
from .statistics import PublishedStatistics, find_input_norm, published_block

Size = int | tuple[int, ...]


class _FastDeconv(PublishedStatistics, layers.Convolution):
    """Convolution with the signature of 2020, in any number of dimensions; see `FastDeconv`."""

    open_dims = False  # True until the first input selects images or signals

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
            raise TypeError("num_groups belongs to the code of 2019: subclass FastDeconv2019")
        if isinstance(groups, bool):  # bias, in the order of 2019
            raise TypeError(
                f"groups must be a number, got {groups}: for positional calls of 2019, "
                "import FastDeconv2019 as FastDeconv"
            )
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
        sizes = (kernel_size, stride, padding, dilation)
        if type(self) is FastDeconv and all(isinstance(size, int | str) for size in sizes):
            self.open_dims = True


class FastDeconv(_FastDeconv, layers.FastDeconv):
    """Published convolution of 2020 for images (N, C, H, W) and signals (N, C, L).

    The first input or loaded weight selects the number of dimensions. If it is a signal, a layer
    whose sizes are all integers becomes a `FastDeconv1d`. The parameters keep their identity, so an
    existing optimizer trains them. Their values become those of a new 1-d layer. With a kernel size
    (k,), the constructor returns a `FastDeconv1d`.

    Import `FastDeconv1d as FastDeconv` if the 1-d weight is needed before the first signal: for an
    initialisation, for DistributedDataParallel or for a subclass.

    With the keyword `num_groups`, the constructor returns a `FastDeconv2019`. Positional arguments
    have the order of 2020. For positional calls of 2019, import `FastDeconv2019 as FastDeconv`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in
            `torch.nn.Conv2d`. With bias=False, the layer still subtracts the mean.
        eps: added to the diagonal of the covariance (default 1e-5), in units of variance.
        n_iter: Newton-Schulz steps, 1 to 15 (default 5).
        momentum: weight of a batch in the running statistics (default 0.1).
        block: maximum number of channels whitened together (default 64). Fewer channels form one
            block. More form blocks of the greatest common divisor of `block` and the channels.
            With groups > 1, each group is one block.
        sampling_stride: distance of sampled patches (default 3), in output pixels.
        freeze, freeze_iter: as in `deconv.FastDeconv` (defaults False and 100).
        options: further keywords of `deconv.FastDeconv`. As published, `sync_stats` is False by
            default: each rank has its own statistics.

    Shape:
        (N, C_in, H, W) -> (N, C_out, H_out, W_out), as in `torch.nn.Conv2d`; or
        (N, C_in, L) -> (N, C_out, L_out), as in `torch.nn.Conv1d`.

    Raises:
        ValueError: an argument is out of range; the input has another shape, or is a signal and
            the layer can no longer become 1-d.
        TypeError: a subclass passes `num_groups`, or a call has `bias` in the place of `groups`:
            both need `FastDeconv2019`.

    Example:
        stem = FastDeconv(3, 64, kernel_size=7, stride=2, padding=3, n_iter=15)
        y = stem(torch.randn(8, 3, 32, 32))  # (8, 64, 16, 16)

    Source: Ye et al., Network Deconvolution, ICLR 2020, Algorithm 1. `PublishedStatistics` lists
    the differences from `deconv.FastDeconv`.
    """

    def __new__(cls, *args: Any, **options: Any) -> Any:
        kernel = options.get("kernel_size", args[2] if len(args) > 2 else None)
        if cls is FastDeconv and isinstance(kernel, tuple | list) and len(kernel) == 1:
            return FastDeconv1d(*args, **options)
        kind = FastDeconv2019 if cls is FastDeconv and "num_groups" in options else cls
        return super().__new__(kind)

    def forward(self, input: Tensor) -> Tensor:  # named as in torch
        """Apply the layer; the first input selects images or signals."""
        if self.open_dims and isinstance(input, Tensor):
            if input.dim() == 3:
                self._refuse_signals(input)
                self._become_1d()
                return self.forward(input)  # of FastDeconv1d
            if not torch.compiler.is_compiling():  # the write would recompile the code
                self.open_dims = False
        return super().forward(input)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._writes = self._count_writes()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, whose parameters count their writes from 0."""
        return {**vars(self), "_writes": self._writes - self._count_writes()}

    def _count_writes(self) -> int:
        """Return the number of in-place writes to the parameters."""
        counted = (p for p in self.parameters() if not p.is_inference())
        return sum(parameter._version for parameter in counted)

    def prepare_input(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            raise ValueError(
                f"input must be images (N, C, H, W), got shape {(*x.shape,)}: for signals "
                "(N, C, L), import FastDeconv1d as FastDeconv; for one image, add a batch dimension"
            )
        return super().prepare_input(x)

    def _refuse_signals(self, x: Tensor) -> None:
        """Raise ValueError if the layer cannot become 1-d for the signals x."""
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"input must be images (N, {self.in_channels}, H, W) or signals "
                f"(N, {self.in_channels}, L), got shape {(*x.shape,)}"
            )
        refuse_sharded(self, "Run a batch through")
        if torch.compiler.is_compiling():
            reason = "it runs in torch.compile"
        elif getattr(self, "_is_replica", False):
            reason = "it is a replica of DataParallel"
        elif find_ddp_group() is not None:
            reason = "DistributedDataParallel has registered its 2-d weight"
        elif self._count_writes() > self._writes:
            reason = "its 2-d weight or bias was changed"
        else:
            return
        raise ValueError(
            f"the layer cannot become 1-d for signals of shape {(*x.shape,)}, because {reason}: "
            "import FastDeconv1d as FastDeconv"
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _become_1d(self) -> None:
        """Become a FastDeconv1d with the same parameter objects.

        The first column of a new 2-d weight of side k, times sqrt(k), has the distribution of a new
        1-d weight. No random numbers are drawn, because activation checkpointing recomputes the
        forward without this step.
        """
        side = self.kernel_size[0]
        self.weight.data = side**0.5 * self.weight.detach()[..., 0]
        if self.bias is not None:
            self.bias.mul_(side**0.5)
        for name in ("kernel_size", "stride", "padding", "dilation", "output_padding"):
            size = getattr(self, name)
            setattr(self, name, size if isinstance(size, str) else size[:1])
        self._reversed_padding_repeated_twice = self._reversed_padding_repeated_twice[:2]
        self.__class__, self.open_dims, self.sample_dims = FastDeconv1d, False, 2  # type: ignore
        channels = self.in_channels // self.groups
        blocks = (self.groups, channels, self.block, side, self.layout, self.shared)
        self.blocks = make_blocks(*blocks, joint=True)
        if self.running_mean is not None:
            like: Any = {"device": self.running_mean.device, "dtype": self.running_mean.dtype}
            for name, value in self.make_statistics(side, **like).items():
                setattr(self, name, value)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load a state_dict; the first weight selects images or signals."""
        weight = state_dict.get(f"{prefix}weight")
        if self.open_dims and isinstance(weight, Tensor):
            self.open_dims = False
            if weight.dim() == 3:
                self._become_1d()
                return self._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        return super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class FastDeconv1d(_FastDeconv, layers.FastDeconv1d):
    """Published convolution of 2020 for signals (N, C, L); see `FastDeconv`.

    Example:
        layer = FastDeconv1d(1, 16, 64, stride=8)
        y = layer(torch.randn(8, 1, 1024))  # (8, 16, 121)
    """


class FastDeconv2019(FastDeconv):
    """Published convolution of 2019 for images (N, C, H, W), with its positional order.

    The layer differs from `FastDeconv` as the code of 2019 differs from that of 2020:
    - Channels with equal c mod G share one mean over all pixels.
    - The layer subtracts this mean before zero padding, so padded pixels equal the mean. It does
      not centre patches.
    - `running_mean` has the shape (1, G, 1, 1).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as in `FastDeconv`.
            The code of 2019 has no groups.
        eps: added to the diagonal of the covariance (default 1e-2), in units of variance.
        n_iter, momentum, sampling_stride: as in `FastDeconv`.
        num_groups: G, channels whitened together (default 16), as `block` of `FastDeconv`.
        options: as in `FastDeconv`, without `sync_stats`, `process_group` and `input_norm`.

    Shape:
        As in `FastDeconv`.

    Raises:
        ValueError: an argument is out of range, or an option does not exist in 2019.

    Example:
        layer = FastDeconv(64, 128, 3, padding=1, num_groups=16, eps=1e-2)  # a FastDeconv2019

    Source: the published code of Ye et al., Network Deconvolution, of 2019.
    """

    pads_with_mean = True

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
                raise ValueError(
                    f"the layer of 2019 takes no {name}, got {options[name]!r}: omit {name}"
                )
        geometry: Any = (stride, padding, dilation, 1, bias)
        whitening: Any = (eps, n_iter, momentum, num_groups, sampling_stride)
        super().__init__(in_channels, out_channels, kernel_size, *geometry, *whitening, **options)

    def make_statistics(self, mean_taps: int, **like: Any) -> dict[str, Tensor]:
        buffers = super().make_statistics(mean_taps, **like)
        return {**buffers, "running_mean": torch.zeros(1, self.blocks.size, 1, 1, **like)}

    def fold_whitening(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Subtract the running mean if it is used; `batch_whitening` subtracts the batch mean."""
        if self.uses_running_stats:
            x = self.centre_input(x)
        return super().fold_whitening(x)

    def centre_input(self, x: Tensor) -> Tensor:
        mean = self._average_channels(x) if self.running_mean is None else self.running_mean
        return x - self._expand_channels(mean).to(x.dtype)

    def batch_whitening(self, x: Tensor) -> tuple[Tensor, int | Tensor, Tensor, Matrices, Matrices]:
        mean = self._average_channels(x)
        centred = x - self._expand_channels(mean)
        x, count, zero, observed, whiten = super().batch_whitening(centred)
        return x, count, zero, {**observed, "mean": mean}, whiten

    def recentre(self, stats: Statistics, blocks: Blocks, axis: str) -> Statistics:
        """Return the statistics about 0, since the mean is already subtracted from the input."""
        return move_centre(stats, torch.zeros_like(stats.mean), axis, blocks)

    def running_patch_mean(self) -> Tensor | None:
        """Return zeros, the mean of the centred input, (C*T,)."""
        if self.running_mean is None:
            return None
        return self.running_mean.new_zeros(self.in_channels * self.blocks.taps)

    def _average_channels(self, x: Tensor) -> Tensor:
        """Return the mean of channels with equal c mod G, (1, G, 1, 1)."""
        means = x.mean((0, 2, 3)).unflatten(0, (-1, self.blocks.size)).mean(0)
        return means.reshape(1, -1, 1, 1)

    def _expand_channels(self, mean: Tensor) -> Tensor:
        """Repeat the mean for all channels, (1, C, 1, 1)."""
        return mean.repeat(1, self.blocks.count, 1, 1)

    def fuse(self) -> nn.Module:
        """Return a depthwise convolution that subtracts the mean, then the plain convolution."""
        plain = super().fuse()
        like: Any = {"device": self.weight.device, "dtype": self.weight.dtype}
        centre = nn.Conv2d(self.in_channels, self.in_channels, 1, groups=self.in_channels, **like)
        with torch.no_grad():
            centre.weight.fill_(1)
            assert centre.bias is not None and self.running_mean is not None
            centre.bias.copy_(-self._expand_channels(self.running_mean).flatten())
        fused = nn.Sequential(centre.requires_grad_(False), plain).train(self.training)
        vars(fused).update(forward_hooks(plain))  # hooks see the input of this layer
        vars(plain).update(forward_hooks(centre))  # none
        return fused


class NormalizedDeconv(FastDeconv):
    """Convolution of the follow-up: `FastDeconv` with `norm_type` and `sync`.

    Args:
        in_channels to freeze_iter: as in `FastDeconv`.
        norm_type: normalisation of each sample: "none" (default), "l1norm" or "layernorm". It is
            `input_norm` of `deconv.FastDeconv`, with `eps` added to the divisor.
        sync: share the batch statistics between ranks (default False), as `sync_stats` of
            `deconv.FastDeconv`.
        options: as in `FastDeconv`.

    Shape:
        As in `FastDeconv`.

    Raises:
        ValueError: an argument is out of range, or the input has another shape.

    Example:
        layer = NormalizedDeconv(64, 128, 3, padding=1, norm_type="layernorm")
        y = layer(torch.randn(8, 64, 32, 32))  # (8, 128, 32, 32)

    NOTE (differs from the published code): "l1norm" averages all elements of a sample, not every
    `sampling_stride`-th element.

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
    """Published DeConv2d of 2019, which takes statistics of every patch.

    Running statistics and state_dict are those of `deconv.FastDeconv`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as in
            `torch.nn.Conv2d`.
        eps: added to the diagonal of the covariance (default 1e-2), in units of variance.
        n_iter: Newton-Schulz steps, 1 to 15 (default 5).
        momentum: weight of a batch in the running statistics (default 0.1).
        mode: 1 (channels, then pixels), 2 (pixels) or 4 (jointly, default).
        num_groups: channels whitened together (default 16), as `block` of `FastDeconv`.
        options: further keywords of `deconv.FastDeconv`. `sync_stats` is False by default.

    Shape:
        As in `torch.nn.Conv2d`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        layer = DeConv2d(64, 128, 3, padding=1, mode=1)
        y = layer(torch.randn(8, 64, 32, 32))  # (8, 128, 32, 32)

    Source: the published code of Ye et al., Network Deconvolution, of 2019.
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
