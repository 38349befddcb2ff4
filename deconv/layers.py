"""The layers: parameters, running statistics, and the wiring of the method's four steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import Blocks, divide_channels, transform_along
from .covariance import (
    average_across,
    count_patches,
    find_share,
    measure_patches,
    second_moment,
    several_processes,
)
from .earlier import deal_back_mean, rename_statistics
from .fold import fold
from .inverse_sqrt import MAX_STEPS, ROOTS, inverse_sqrt, inverse_sqrt_from_rows
from .patches import Sampling, Spots, Window, gather
from .products import identity

# What each mode whitens, in this order. 4 and 5 differ in the patches they look at.
MODES: dict[int, tuple[str, ...]] = {
    1: ("channel", "pixel"),
    2: ("pixel",),
    3: ("channel",),
    4: ("joint",),
    5: ("joint",),
}
LAYOUTS = ("contiguous", "interleaved")
Matrices = dict[str, torch.Tensor]  # (G, d, d) by axis


def _blocks(
    groups: int, channels: int, block: int, taps: int, layout: str, shared: bool, joint: bool
) -> Blocks:
    """Blocks of the largest admissible size, dealt as `layout` says."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    size = divide_channels(channels, block)
    dealt = 1 if joint else taps  # whitening single axes needs the channels whole
    unit = size * taps if layout == "contiguous" else dealt
    return Blocks(groups, channels, size, taps, unit, shared)


def _full_precision(device: torch.device) -> AbstractContextManager:
    """Autocast off: half precision overflows in squares. Nothing where there is no autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _in_backward() -> bool:
    """Whether a backward is under way: what runs a layer then is gradient checkpointing, again.

    Both kinds of `torch.utils.checkpoint` forget what the forward computed, and run it once more
    within the backward. The engine itself tells, which needs no word from the user (`context_fn`
    is for one of the two kinds), and no guess at whether this input was seen before. A graph that
    torch.compile has made cannot ask: compile what checkpoints, not what is checkpointed.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def forward_hooks(module: nn.Module) -> dict[str, Any]:
    """Copies of the attributes that hold a module's hooks before and after forward."""
    return {name: copy(value) for name, value in vars(module).items() if "_forward_" in name}


class _Whitening(nn.Module):
    """Running statistics and the fold: what all deconvolution layers share.

    A layer adds `_present(x)`: its input as (N, C, *size), as the kernel sees it; and of that
    `_sampling(x)`: which patches are looked at, and how they fall into blocks.

    Buffers: `running_mean` (C*T,), for every axis of the mode one `running_cov_<axis>` (G, d, d),
    and `num_batches_tracked`; float32 in networks of half precision, too. The first batch replaces
    their start instead of joining it, and a layer that has seen no batch yet acts as the plain
    convolution, mean 0 and D = I.

    As BatchNorm averages variances and not their roots, so are covariances averaged here, and D is
    the root of their average. That costs evaluation a root, until `fuse` takes it once for all.

    NOTE (differs from the published code): which averages D. While covariances move, as in the
    first epoch, the mean of their roots whitens less well than the root of their mean (and the
    Cholesky factor, which turns, less well than the symmetric root).
    """

    def _init_whitening(
        self,
        axes: tuple[str, ...],
        blocks: Blocks,
        *,
        mean_taps: int,
        eps: float,
        n_iter: int,
        momentum: float,
        sync_stats: bool,
        track_running_stats: bool,
    ) -> None:
        if not eps > 0:
            raise ValueError(f"eps must be above 0 (units of variance), got {eps}")
        if n_iter not in range(1, MAX_STEPS + 1):
            raise ValueError(f"n_iter must be a whole number, 1 to {MAX_STEPS} steps, got {n_iter}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}")
        self.axes, self.blocks = axes, blocks
        self.eps, self.n_iter, self.momentum = eps, n_iter, momentum
        self.sync_stats, self.track_running_stats = sync_stats, track_running_stats
        sides = {"joint": blocks.features, "channel": blocks.size, "pixel": blocks.taps}
        mean = torch.zeros(blocks.groups * blocks.channels * mean_taps)
        buffers = {"mean": mean} | {
            f"cov_{axis}": torch.eye(sides[axis]).repeat(blocks.matrices, 1, 1) for axis in axes
        }
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        on = {"device": self.weight.device, "dtype": dtype}
        buffers = {f"running_{name}": start.to(**on) for name, start in buffers.items()}
        count = torch.tensor(0, dtype=torch.long, device=self.weight.device)
        for name, start in {**buffers, "num_batches_tracked": count}.items():
            self.register_buffer(name, start if track_running_stats else None)

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Forget all batches: mean 0, D = I, and the next batch replaces them."""
        if not self.track_running_stats:
            return
        self.running_mean.zero_()
        for cov in self._running_covariances().values():
            cov.copy_(torch.eye(cov.shape[-1], device=cov.device))
        self.num_batches_tracked.zero_()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """As torch's, for `to`, `half` and their like, but statistics stay float32 at least.

        Variances of half precision overflow, and averages of it stand still.
        """
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, new in self._buffers.items():
            if new is not None and new.is_floating_point() and new.dtype.itemsize < 4:
                self._buffers[name] = before[name].to(new.device, torch.float32)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        deal_back_mean(state_dict, prefix, self.blocks)
        rename_statistics(
            state_dict, prefix, self.axes, n_iter=self.n_iter, root=self.root, eps=self.eps
        )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _whitened(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, and a weight and a bias that act on it as the layer's own act on whitened x."""
        with _full_precision(x.device):
            if not self.training and self.track_running_stats:
                # Not kept for later: no version counter would tell of all edits to a buffer.
                return x, *self._fold(*self._running_whitening())
            x, count, mean, cov, whiten = self._estimate_whitening(x, *self._sampling(x))
            weight, bias = self._fold(mean, whiten)
            if self.track_running_stats and not _in_backward():
                self._update_running(count, mean, cov, bias)
            return x, weight, bias

    def _estimate_whitening(
        self, x: torch.Tensor, sampling: Sampling, blocks: Blocks
    ) -> tuple[torch.Tensor, int | torch.Tensor, torch.Tensor, Matrices, Matrices]:
        """x, patches looked at, their mean (C*T,), covariances and whitening matrices by axis."""
        together = self.sync_stats and several_processes()
        count = count_patches(x, sampling)
        if not together and self._has_few_rows(count):
            return x, count, *self._estimate_from_rows(gather(x, sampling))
        covs: Matrices = {}
        whiten: Matrices = {}
        total, mean, done = count, None, None
        for axis in self.axes:  # the second axis sees what the first has whitened
            x, centre, cov, *of_all = measure_patches(x, sampling, blocks, axis, done)
            means = centre, *of_all
            if together:
                total, cov, *means = self._pool(count, cov, axis, blocks, done, *means)
            mean = means[-1] if mean is None else mean
            covs[axis] = cov
            whiten[axis] = inverse_sqrt(cov, self.n_iter, self.root, self.eps)
            done = axis, whiten[axis]
        return x, total, mean, covs, whiten

    def _has_few_rows(self, count: int) -> bool:
        """Whether the root is cheaper on the side of the rows than on that of the features."""
        newton = self.axes == ("joint",) and self.root == "newton"
        return newton and 0 < 2 * count * self.blocks.sharing < self.blocks.features

    def _estimate_from_rows(self, maps: torch.Tensor) -> tuple[torch.Tensor, Matrices, Matrices]:
        mean = maps.mean(dim=(0, 2), keepdim=True)
        vectors = self.blocks.along("joint", maps - mean)
        rows = vectors.unflatten(1, (self.blocks.matrices, -1)).permute(1, 0, 3, 2).flatten(1, 2)
        whiten = inverse_sqrt_from_rows(rows, self.eps, self.n_iter)
        known = rows.detach()
        cov = (known.mT @ known).div_(rows.shape[1])
        return mean.flatten(), {"joint": cov}, {"joint": whiten}

    def _pool(
        self,
        count: int,
        cov: torch.Tensor,
        axis: str,
        blocks: Blocks,
        done: tuple[str, torch.Tensor] | None,
        centre: torch.Tensor,
        *means: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Of all processes, from those of each one: patches, covariance, its centre, other means.

        Second moments add up about any point that all processes agree on. The running mean is one,
        and so near the mean that little cancels when the shift between the two is taken out. (Not
        before the first batch, when it is 0: means of hundreds of standard deviations would.)
        """
        agreed = torch.zeros_like(centre) if self.running_mean is None else self.running_mean
        offset = (centre - agreed)[None, :, None]
        if done is not None:
            offset = transform_along(done[0], offset, done[1], blocks)
        about = cov + second_moment(offset, axis, blocks)
        total, shift, about, *means = average_across(count, offset, about, *means)
        centre = agreed + shift.flatten()  # of raw features, where nothing is done
        return total, about - second_moment(shift, axis, blocks), centre, *means

    def _running_covariances(self) -> Matrices:
        return {axis: getattr(self, f"running_cov_{axis}") for axis in self.axes}

    @torch.no_grad()
    def _running_whitening(self) -> tuple[torch.Tensor, Matrices]:
        """Mean and D of the running statistics: copies, which outlast an update of those.

        Raises:
            ValueError: there are none.
        """
        if not self.track_running_stats:
            raise ValueError(f"{self} has no running statistics: no plain layer does what it does")
        seen, whiten = self.num_batches_tracked > 0, {}
        for axis, cov in self._running_covariances().items():
            cov = cov.to(torch.promote_types(cov.dtype, torch.float32))
            matrix = inverse_sqrt(cov, self.n_iter, self.root, self.eps)
            whiten[axis] = torch.where(seen, matrix, identity(cov))
        return self.running_mean.clone(), whiten

    @torch.no_grad()
    def _update_running(
        self, count: int | torch.Tensor, mean: torch.Tensor, covs: Matrices, bias: torch.Tensor
    ) -> None:
        """Move the running statistics to the batch's; empty and non-finite ones leave no trace.

        `bias`, the folded one, has sums over all of mean and D in it: it is finite if they are, and
        D is NaN if a covariance is not.
        """
        total = bias.sum()
        if not (isinstance(count, int) and count):  # none, or perhaps none in all processes
            total = total / count
        usable = total - total == 0  # not for infinity, NaN, or anything divided by 0
        step = (self.num_batches_tracked == 0).clamp(min=self.momentum)
        running = self.running_mean, *self._running_covariances().values()
        for old, new in zip(running, (mean, *covs.values()), strict=True):
            old.lerp_(torch.where(usable, new.to(old.dtype), old), step.to(old.dtype))
        self.num_batches_tracked += usable

    def _fold(self, mean: torch.Tensor, whiten: Matrices) -> tuple[torch.Tensor, torch.Tensor]:
        """Effective weight and bias, computed in the statistics' precision."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        whiten = {axis: matrix.to(dtype) for axis, matrix in whiten.items()}
        weight, bias = fold(self.turn(weight), bias, mean.to(dtype), whiten, self.blocks)
        return self.turn(weight).to(self.weight.dtype), bias.to(self.weight.dtype)

    def turn(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as rows for each output channel, (out, C, *kernel), and back again."""
        return weight

    @torch.no_grad()
    def _folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the plain layer that this one is in evaluation."""
        with _full_precision(self.weight.device):
            return self._fold(*self._running_whitening())

    def whitened_weight(self) -> torch.Tensor:
        """W D with the running statistics: the kernel as raw input sees it, of weight's shape."""
        return self._folded()[0]

    @torch.no_grad()
    def whitening_kernels(self) -> torch.Tensor:
        """D with the running statistics, as kernels (groups * C*T, C, *kernel).

        The n-th is what, laid on raw input, makes the n-th feature of a patch white; features are
        numbered as in `weight.flatten(1)`, group by group.
        """
        rows, (mean, whiten) = self.turn(self.weight), self._running_whitening()
        whiten = {axis: matrix.to(mean) for axis, matrix in whiten.items()}
        single = torch.eye(rows[0].numel()).to(mean).reshape(-1, *rows.shape[1:])
        single = single.repeat(self.blocks.groups, *[1] * (rows.dim() - 1))
        return fold(single, None, mean, whiten, self.blocks)[0]

    def _settle(self, plain: nn.Module) -> nn.Module:
        """`plain` with the folded weight and bias, and with the mode and forward hooks of this."""
        if {"weight", "bias"} & vars(self).keys():  # what a hook set, perhaps long ago
            raise ValueError(
                f"a hook computes weight or bias of {self}: make them permanent first "
                "(prune.remove, remove_weight_norm)"
            )
        weight, bias = self._folded()
        with torch.no_grad():
            weight = torch.empty_like(self.weight).copy_(weight)  # its memory format
        learned = self.weight.requires_grad
        plain.weight = nn.Parameter(weight, learned)
        plain.bias = nn.Parameter(bias, learned if self.bias is None else self.bias.requires_grad)
        vars(plain).update(forward_hooks(self))
        return plain.train(self.training)

    def _whitening_repr(self, asked: int) -> str:
        size = self.blocks.size
        block = f"{size}" if size == asked else f"{size} (largest divisor up to {asked})"
        return (
            f"block={block}, layout={self.layout}, shared={self.shared}, "
            f"eps={self.eps}, n_iter={self.n_iter}, momentum={self.momentum}"
            + ("" if self.sync_stats else ", sync_stats=False")
            + ("" if self.track_running_stats else ", track_running_stats=False")
        )


class _Convolution(_Whitening):
    """Convolutions of any number of dimensions, see `FastDeconv`.

    A layer is this and the class of torch that it stands for, `plain`, and adds `convolve`, the
    function of torch that does its work.
    """

    plain: type[nn.Module]
    convolve: Callable[..., torch.Tensor]

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
        momentum: float = 0.1,
        sampling_stride: int = 3,
        rows_per_feature: float = 32,
        root: str = "cholesky",
        layout: str = "interleaved",
        shared: bool = True,
        sync_stats: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
        if sampling_stride < 1 or sampling_stride % 1:
            raise ValueError(
                f"sampling_stride must be a whole number of patches, at least 1, "
                f"got {sampling_stride}"
            )
        if not rows_per_feature >= 0:
            raise ValueError(
                f"rows_per_feature must be 0 (all) or a number, got {rows_per_feature}"
            )
        if root not in ROOTS:
            raise ValueError(f"root must be one of {ROOTS}, got {root!r}")
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
        self.mode, self.block, self.sampling_stride = mode, block, sampling_stride
        self.layout, self.shared, self.rows_per_feature = layout, shared, rows_per_feature
        self.root = root
        channels = in_channels // groups
        taps = self.weight[0, 0].numel()
        self._init_whitening(
            MODES[mode],
            _blocks(groups, channels, block, taps, layout, shared, joint=mode in (4, 5)),
            mean_taps=1 if mode == 3 else taps,
            eps=eps,
            n_iter=n_iter,
            momentum=momentum,
            sync_stats=sync_stats,
            track_running_stats=track_running_stats,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check_channels(x)
        padding = self.padding if self.padding_mode == "zeros" else 0
        where = (self.stride, padding, self.dilation, self.groups)
        y = self.convolve(*self._whitened(self._present(x)), *where)
        return y if self._is_batch(x) else y.squeeze(0)

    def _is_batch(self, x: torch.Tensor) -> bool:
        """As torch, a convolution takes one picture without a batch, too."""
        return x.dim() == len(self.kernel_size) + 2

    def _present(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self._is_batch(x) else x.unsqueeze(0)
        if self.padding_mode == "zeros":
            return x
        return F.pad(x, self._reversed_padding_repeated_twice, self.padding_mode)

    def _check_channels(self, x: torch.Tensor) -> None:
        dims = len(self.kernel_size)
        if x.dim() not in (dims + 1, dims + 2) or x.shape[-1 - dims] != self.in_channels:
            raise ValueError(
                f"input must have {self.in_channels} channels and {dims} dimensions of pixels, "
                f"got shape {(*x.shape,)}"
            )

    def _sampling(self, x: torch.Tensor) -> tuple[Sampling, Blocks]:
        """Which patches the mode looks at, and how they fall into blocks."""
        if self.mode == 3:
            unit = self.blocks.unit // self.blocks.taps
            return self._see_pixels(), replace(self.blocks, taps=1, unit=unit)
        window = self._see(1 if self.mode == 4 else self.sampling_stride)
        if self.mode == 4 or not self.rows_per_feature:
            return window, self.blocks
        return self._look_at_enough(x, window), self.blocks

    def _see(self, step: int) -> Window:
        """Every `step`-th patch that the kernel sees in each direction."""
        stride, padding = tuple(step * s for s in self.stride), (0, 0) * len(self.stride)
        if self.padding_mode == "zeros":
            padding = tuple(self._reversed_padding_repeated_twice)
        return Window(self.kernel_size, stride, self.dilation, padding)

    def _see_pixels(self) -> Window:
        """Single pixels, without the padding that would pull them to zero."""
        one, step = (1,) * len(self.stride), (self.sampling_stride,) * len(self.stride)
        return Window(one, step, one, (0, 0) * len(one))

    def _look_at_enough(self, x: torch.Tensor, window: Window) -> Sampling:
        """So few patches that there are about `rows_per_feature` rows for each feature of a matrix.

        Several processes look at the same ones as one would, see `batch_share`.
        """
        together = self.sync_stats and several_processes()
        first, total = find_share(len(x)) if together else (0, len(x))
        patches = self.rows_per_feature * self.blocks.features / self.blocks.sharing
        per_picture = max(round(patches / max(total, 1)), 1)
        if per_picture >= window.count(x.shape[2:]):
            return window
        return Spots(window, per_picture, first)

    def fuse(self) -> nn.Module:
        """The plain convolution that this layer is in evaluation; see `deconv.fuse`.

        It may be asked of a layer in training as well, and is then in training mode itself.

        Raises:
            ValueError: a hook computes the weight or the bias.
        """
        shape = (self.in_channels, self.out_channels, self.kernel_size)
        return self._settle(self.plain(*shape, **find_geometry(self), device="meta"))

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, mode={self.mode}, {self._whitening_repr(self.block)}, "
            f"sampling_stride={self.sampling_stride}, "
            f"rows_per_feature={self.rows_per_feature}, root={self.root}"
        )


def find_geometry(conv: nn.Module) -> dict[str, Any]:
    """What a convolution is told beside its shape, but for its bias: of torch's or of ours."""
    names = ["stride", "padding", "dilation", "groups", "padding_mode"]
    names += ["output_padding"] if conv.transposed else []
    return {name: getattr(conv, name) for name in names}


class FastDeconv(_Convolution, nn.Conv2d):
    """A 2-d convolution that whitens the patches its kernel sees, by folding the whitening into it.

        y = W D (x - mu) + b = (W D) x + (b - W D mu),    D ~ Cov(x)^(-1/2)

    In training mu and D come from the batch, and gradients flow through them; running averages of
    mu and of the covariance are kept for evaluation, where the layer is a plain convolution. Use it
    in place of a convolution and the BatchNorm beside it.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in
            `torch.nn.Conv2d`. A grouped convolution whitens each group by itself.
        padding_mode: as there. "reflect", "replicate" and "circular" fill the map first, and its
            patches are then those that are whitened.
        mode: 1 separable (channels, then pixels), 2 pixels, 3 channels, 4 joint over every patch,
            5 joint over sampled patches.
        block: B, channels whitened together. A group's C channels form blocks of the largest
            divisor of C up to `block`.
        eps: regularisation of the covariance, in units of variance.
        n_iter: Newton-Schulz steps, 1 to 15.
        momentum: weight of the new batch in the running statistics.
        sampling_stride: every so-many-th patch in each direction is looked at, times the
            convolution's own stride. Mode 3 looks at every so-many-th pixel; mode 4 at every patch,
            whatever this says.
        rows_per_feature: modes 1, 2 and 5 look at so few patches of each picture, see `Spots`,
            that a batch has about so many rows, vectors of a block, for each feature of a matrix;
            0: at all that sampling leaves, as published. A patch has a row in each of the blocks
            that share a matrix. One patch of each picture is the least. The mean is that of all
            patches in any case.
        root: "newton", the symmetric root, or "cholesky", the inverse Cholesky factor, with the
            floor of `n_iter` steps, see `inverse_sqrt`.
        layout, shared: see `Blocks`.
        sync_stats: under torch.distributed, the statistics in training are those of the patches of
            all processes, so that N processes equal one with the whole batch, whatever each one's
            share of it, be it none (where shares differ, `batch_share` must tell them). All must
            then run the layer equally often, and start from the same buffers (DDP sees to it). A
            layer sends one message forward and one backward, mode 1 two for its two axes, of
            1 + C T + G d^2 numbers each: C all channels, T the taps (1 in mode 3), G whitening
            matrices of side d. Where few patches are looked at, the first has another C T for the
            mean of all. Evaluation sends nothing.
        track_running_stats: False: none are kept, for what cannot write to buffers; the layer then
            whitens by its batch in evaluation as well, and `fuse` refuses it.

    Shape:
        (N, C, H, W) -> as `torch.nn.Conv2d`; N may be 0, which leaves the statistics alone.

    Raises:
        ValueError: an argument is out of range.

    Source: Ye et al., Network Deconvolution, ICLR 2020, algorithm 1.
    """

    plain, convolve = nn.Conv2d, staticmethod(F.conv2d)


class Delinear(_Whitening, nn.Linear):
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
        rows, weight, bias = self._whitened(self._present(x))
        return F.linear(rows.reshape(x.shape), weight, bias)

    def _present(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, self.in_features, 1)

    def _sampling(self, x: torch.Tensor) -> tuple[Sampling, Blocks]:
        return Window((1,), (1,), (1,), (0, 0)), self.blocks

    def fuse(self) -> nn.Linear:
        """The plain linear layer that this one is in evaluation; as `FastDeconv.fuse`."""
        return self._settle(nn.Linear(self.in_features, self.out_features, device="meta"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._whitening_repr(self.block)}"
