"""Convolutions in 1 to 3 dimensions that whiten the patches their kernel sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed, fx, nn
from torch.nn import functional as F

from .ops.blocks import Blocks, make_blocks
from .ops.inverse_sqrt import ROOTS
from .ops.patches import PatchGrid, PatchSubset, Sampling
from .recording import record_call
from .whitening import Whitening, require_choice, require_positive

# Whitened axes by mode, in order. Modes 4 and 5 differ in the patches they sample.
MODES: dict[int, tuple[str, ...]] = {
    1: ("channel", "pixel"),
    2: ("pixel",),
    3: ("channel",),
    4: ("joint",),
    5: ("joint",),
}
ROWS_PER_FEATURE = 24.0
MIN_ROWS = 2048  # with fewer, the scale of an output varies by over 3 % from batch to batch


class Convolution(Whitening):
    """Base class of deconvolutions in any number of dimensions; see `FastDeconv`.

    A subclass defines `plain`, the class of torch that it replaces, and `convolve`, the function of
    torch for it.
    """

    plain: Callable[..., nn.Module]
    convolve: Callable[..., Tensor]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    padding_mode: Any  # str; torch declares it differently per class
    transposed: bool
    _reversed_padding_repeated_twice: list[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        mode: int = 5,
        block: int = 16,
        eps: float = 1e-2,
        n_iter: int = 5,
        momentum: float | None = 0.1,
        sampling_stride: int = 3,
        rows_per_feature: float | None = None,
        root: str = "cholesky",
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
        require_positive(in_channels=in_channels, out_channels=out_channels)
        if mode not in MODES or isinstance(mode, bool):  # True equals 1
            raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
        if sampling_stride < 1 or sampling_stride % 1:
            raise ValueError(
                f"sampling_stride must be a whole number of patches, at least 1, "
                f"got {sampling_stride}"
            )
        if rows_per_feature is not None and not rows_per_feature >= 0:
            raise ValueError(
                f"rows_per_feature must be 0 (all) or a number, got {rows_per_feature}"
            )
        require_choice("root", root, ROOTS)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        sides = {name: getattr(self, name) for name in ("kernel_size", "stride", "dilation")}
        require_positive(**{name: min(side) for name, side in sides.items()})
        self.mode, self.block, self.sampling_stride = mode, block, int(sampling_stride)
        self.layout, self.shared, self.rows_per_feature = layout, shared, rows_per_feature
        self.root, self.sample_dims = root, 1 + len(self.kernel_size)
        channels = in_channels // groups
        taps = self.weight[0, 0].numel()
        self.init_whitening(
            MODES[mode],
            make_blocks(groups, channels, block, taps, layout, shared, joint=mode in (4, 5)),
            mean_taps=1 if mode == 3 else taps,
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

    __init__.__qualname__ = "FastDeconv.__init__"  # shown in TypeErrors about its arguments

    def forward(self, input: Tensor) -> Tensor:  # named as in torch
        """Whiten the patches and apply the kernel, as one convolution with a folded weight."""
        if isinstance(input, fx.Proxy):
            return record_call(self, input)
        self.begin_forward(input)
        padding = self.padding if self.padding_mode == "zeros" else 0
        images, weight, bias = self.fold_whitening(self.prepare_input(input))
        y = self.convolve(images, weight, bias, self.stride, padding, self.dilation, self.groups)
        return y if self._is_batch(input) else y.squeeze(0)

    def _is_batch(self, x: Tensor) -> bool:
        """Return True if x has a batch dimension; torch also accepts a single image without it."""
        return x.dim() == len(self.kernel_size) + 2

    def prepare_input(self, x: Tensor) -> Tensor:
        """Return x as (N, C, *size), normalised and, unless padding_mode is "zeros", padded."""
        dims = len(self.kernel_size)
        if x.dim() not in (dims + 1, dims + 2) or x.shape[-1 - dims] != self.in_channels:
            raise ValueError(
                f"input must have {self.in_channels} channels and {dims} dimensions of pixels, "
                f"got shape {(*x.shape,)}"
            )
        x = self.normalize_input(x)
        x = x if self._is_batch(x) else x.unsqueeze(0)
        if self.padding_mode == "zeros":
            return x
        return F.pad(x, self._reversed_padding_repeated_twice, self.padding_mode)

    def check_input(self, x: Tensor) -> Tensor:
        """Return the prepared input on the meta device; also refuse images below kernel size."""
        images = super().check_input(x)
        self.patch_grid(1).count(images.shape[2:])
        return images

    def choose_patches(self, x: Tensor) -> tuple[Sampling, Blocks]:
        """Return the patches of x that the mode samples, and the blocks of their features."""
        if self.mode == 3:
            self.patch_grid(1).count(x.shape[2:])  # raises for images smaller than the kernel
            unit = self.blocks.unit // self.blocks.taps
            return self._pixel_grid(), replace(self.blocks, taps=1, unit=unit)
        grid = self.patch_grid(1 if self.mode == 4 else self.sampling_stride)
        if self.mode == 4 or self.rows_per_feature == 0:
            return grid, self.blocks
        return self.subsample(x, grid), self.blocks

    def patch_grid(self, step: int) -> PatchGrid:
        """Return the grid of every `step`-th patch of the convolution in each direction."""
        stride, padding = tuple(step * s for s in self.stride), (0, 0) * len(self.stride)
        if self.padding_mode == "zeros":
            padding = tuple(self._reversed_padding_repeated_twice)
        return PatchGrid(self.kernel_size, stride, self.dilation, padding)

    def _pixel_grid(self) -> PatchGrid:
        """Return the grid of single pixels, without padding, which would bias their mean to 0."""
        one, step = (1,) * len(self.stride), (self.sampling_stride,) * len(self.stride)
        return PatchGrid(one, step, one, (0, 0) * len(one))

    def subsample(self, x: Tensor, grid: PatchGrid) -> Sampling:
        """Return enough patches for the rows of each matrix that `rows_per_feature` asks for.

        Ranks that share statistics sample the patches that one rank with the whole batch would.
        """
        share = self.find_share()
        first, total = (0, len(x)) if share is None else share.locate(len(x))
        features = self.blocks.features
        if self.rows_per_feature is None:
            rows = max(ROWS_PER_FEATURE * features, MIN_ROWS)
        else:
            rows = self.rows_per_feature * features
        patches = rows / self.blocks.sharing
        positions = grid.count(x.shape[2:])
        per_image = max(round(min(patches / max(total, 1), positions)), 1)
        return grid if per_image >= positions else PatchSubset(grid, per_image, first)

    def fuse(self) -> nn.Module:
        """Return the plain convolution that equals this layer in evaluation.

        The convolution has the training flag of the layer. With `input_norm`, an `InputNorm`
        precedes it.

        Raises:
            ValueError: a hook computes the weight or the bias, there are no running statistics, or
                the layer is sharded.
        """
        shape = (self.in_channels, self.out_channels, self.kernel_size)
        return self._fuse_into(self.plain(*shape, **find_geometry(self), device="meta"))

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, mode={self.mode}, {self._whitening_repr(self.block)}, "
            f"sampling_stride={self.sampling_stride}, "
            + ("" if (rows := self.rows_per_feature) is None else f"rows_per_feature={rows}, ")
            + f"root={self.root}"
        )


def find_geometry(conv: Any) -> dict[str, Any]:
    """Return the arguments of a convolution or deconvolution, without its shape and bias."""
    names = ["stride", "padding", "dilation", "groups", "padding_mode"]
    names += ["output_padding"] if conv.transposed else []
    return {name: getattr(conv, name) for name in names}


class FastDeconv(Convolution, nn.Conv2d):
    """2-d convolution that whitens its input patches; it replaces Conv2d and BatchNorm2d.

        y = W D (x - mu) + b = (W D) x + (b - W D mu),    D ~ (Cov(x) + eps I)^(-1/2)

    In training, mu and D come from the batch, and gradients flow through both. For evaluation the
    layer keeps running averages of mu and of the covariance. It then equals a plain convolution.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in
            `torch.nn.Conv2d`. Each group of a grouped convolution is whitened separately.
        padding_mode: as in `torch.nn.Conv2d`. "reflect", "replicate" and "circular" pad the input
            before its patches are whitened.
        mode: axes that are whitened, and patches that are sampled (default 5).
            1: channels, then pixels (separable). 2: pixels. 3: channels.
            4: channels and pixels jointly, over every patch.
            5: channels and pixels jointly, over sampled patches.
        block: maximum number of channels whitened together (default 16). The C channels of a group
            form blocks of B channels, with B the largest divisor of C up to `block`.
        eps: added to the diagonal of the covariance (default 1e-2), in units of variance.
        n_iter: Newton-Schulz steps, 1 to 15 (default 5).
        momentum: weight of a batch in the running statistics, in (0, 1] (default 0.1). None: the
            mean of all batches, as in BatchNorm.
        sampling_stride: distance of sampled patches (default 3), in output pixels. Mode 3 samples
            input pixels at this distance, mode 4 every patch.
        rows_per_feature: rows per feature for the covariance, in modes 1, 2 and 5. None (default):
            24, and at least 2,048 rows. The layer takes as many patches at `sampling_stride` as
            give this number, rounded to whole patches per image, at least one. A patch has one row
            per block that shares the matrix. 0: all patches at `sampling_stride`, as published. The
            mean is over all patches at `sampling_stride`.
        root: algorithm that computes D (default "cholesky"), see `inverse_sqrt`.
            "newton": `n_iter` steps of Newton-Schulz, as published.
            "resolvent": equal to "newton" within 0.75 %, from one inverse for `n_iter` up to 5.
            "cholesky": the inverse Cholesky factor, with the soft floor of `n_iter` steps.
        layout: assignment of features to blocks, "contiguous" or "interleaved" (default), see
            `Blocks`.
        shared: all blocks of a group share one D (default True), as published.
        sync_stats: share batch statistics between ranks (default True). False: never share. Ranks
            share inside DistributedDataParallel, with a `process_group` and in `batch_share`. N
            ranks then compute the step of one rank with the whole batch. Ranks without images
            participate as well; for unequal parts of the batch, see `batch_share`. Image sizes may
            differ: the weight of a rank is its number of images times their patches. All ranks must
            run the layer equally often and start from equal buffers. A layer sends one message in
            the forward and one in the backward (mode 1: two each), see docs/scaling.md. Evaluation
            with running statistics sends no message.
        process_group: ranks that always share, for models outside DistributedDataParallel, such as
            models under fully_shard. Every rank must run the layer; the others wait otherwise.
            None (default): the ranks of the active DistributedDataParallel. Without one, each rank
            has its own statistics.
        track_running_stats: keep running statistics (default True). If False, evaluation uses batch
            statistics, and `fuse` raises ValueError.
        input_norm: normalisation of each sample by its own statistics, before whitening (default
            "none"), see `normalize_samples`. A positive factor of a sample then cancels. `fuse`
            puts an `InputNorm` before the plain layer.
            "layer": subtract the mean of all C * H * W elements, divide by their standard
            deviation. "l1": divide by their mean absolute value. 1e-5 is added to each divisor.
        freeze: alternate between batch and running statistics in training (default False), as
            published for the first layer of a network. `freeze_iter` forwards use batch statistics.
            The next 9 * `freeze_iter` forwards use running statistics, without a gradient through
            them. Such batches do not update the statistics, and ranks send no message. The buffer
            `freeze_steps` counts the forwards in training mode.
        freeze_iter: forwards with batch statistics in a cycle of 10 * `freeze_iter` (default 100).
        device, dtype: of the parameters, as in `torch.nn.Conv2d`.

    Shape:
        (N, C, H, W) or (C, H, W), as in `torch.nn.Conv2d`. N = 0 does not change the statistics.

    Raises:
        ValueError: an argument is out of range; the input has another number of channels, another
            dtype or a size below the kernel.

    Example:
        layer = FastDeconv(64, 128, 3, padding=1)
        y = layer(torch.randn(8, 64, 32, 32))  # (8, 128, 32, 32)

    Source: Ye et al., Network Deconvolution, ICLR 2020, section 3, Algorithm 1.

    NOTE (differs from the published code): with `freeze`, later cycles of the published code have
    one more forward with batch statistics.
    """

    plain, convolve = nn.Conv2d, staticmethod(F.conv2d)


class FastDeconv1d(Convolution, nn.Conv1d):
    """`FastDeconv` for sequences (N, C, L), in place of `nn.Conv1d`.

    Args:
        arguments: as in `torch.nn.Conv1d`, with the keywords of `FastDeconv`.

    Example:
        layer = FastDeconv1d(1, 32, 8, stride=4)
        y = layer(torch.randn(8, 1, 4000))  # (8, 32, 999)
    """

    plain, convolve = nn.Conv1d, staticmethod(F.conv1d)


class FastDeconv3d(Convolution, nn.Conv3d):
    """`FastDeconv` for volumes (N, C, D, H, W), in place of `nn.Conv3d`.

    Args:
        arguments: as in `torch.nn.Conv3d`, with the keywords of `FastDeconv`.

    Example:
        layer = FastDeconv3d(3, 16, 3, padding=1)
        y = layer(torch.randn(8, 3, 4, 32, 32))  # (8, 16, 4, 32, 32)
    """

    plain, convolve = nn.Conv3d, staticmethod(F.conv3d)


FastDeconv2d = FastDeconv
