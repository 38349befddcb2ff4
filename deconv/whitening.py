"""What all layers share: the method's four steps, and running statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

import torch
from torch import nn

from .ops.blocks import Blocks, divide_channels, transform_along
from .ops.covariance import count_patches, measure_patches, second_moment
from .ops.fold import fold, whiten_pixels
from .ops.inverse_sqrt import MAX_STEPS, inverse_sqrt, inverse_sqrt_from_rows
from .ops.matmul import identity
from .ops.patches import PatchGrid, Sampling, gather
from .published import deal_back_mean, rename_statistics
from .sync import average_across, several_processes


def _refuse_none_of(**counts: int) -> None:
    """Raise ValueError where there is nothing to whiten, or to give."""
    for name, count in counts.items():
        if not count >= 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


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


LAYOUTS = ("contiguous", "interleaved")
Matrices = dict[str, torch.Tensor]  # (G, d, d) by axis


def full_precision(device: torch.device) -> AbstractContextManager:
    """Autocast off: half precision overflows in squares. Nothing on the meta device, without it."""
    if device.type == "meta":  # by name, as PyTorch 2.11 cannot compile `is_autocast_available`
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


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


class Whitening(nn.Module):
    """Running statistics and the fold: what all deconvolution layers share.

    A layer adds `prepare_input(x)`: its input as (N, C, *size), as the kernel sees it; and of that
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
        if not self.weight.is_floating_point():
            raise ValueError(f"dtype must be one of real numbers, got {self.weight.dtype}")
        if not eps > 0:
            raise ValueError(f"eps must be above 0 (units of variance), got {eps}")
        if n_iter not in range(1, MAX_STEPS + 1):
            raise ValueError(f"n_iter must be a whole number, 1 to {MAX_STEPS} steps, got {n_iter}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}")
        self.axes, self.blocks = axes, blocks
        self.eps, self.n_iter, self.momentum = eps, n_iter, momentum
        self.sync_stats, self.track_running_stats = sync_stats, track_running_stats
        mean = torch.zeros(blocks.groups * blocks.channels * mean_taps)
        buffers = {"mean": mean} | {
            f"cov_{axis}": torch.eye(blocks.side(axis)).repeat(blocks.matrices, 1, 1)
            for axis in axes
        }
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        on = {"device": self.weight.device, "dtype": dtype}
        buffers = {f"running_{name}": start.to(**on) for name, start in buffers.items()}
        count = torch.tensor(0, dtype=torch.long, device=self.weight.device)
        for name, start in {**buffers, "num_batches_tracked": count}.items():
            self.register_buffer(name, start if track_running_stats else None)

    def reset_parameters(self) -> None:
        """As torch's layers; statistics start anew, too: `to_empty` gives any numbers."""
        super().reset_parameters()
        if hasattr(self, "track_running_stats"):  # not yet when torch's constructor asks
            self.reset_running_stats()

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

    def fold_whitening(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, and a weight and a bias that act on it as the layer's own act on whitened x."""
        with full_precision(x.device):
            if not self.training and self.track_running_stats:
                # Not kept for later: no version counter would tell of all edits to a buffer.
                return x, *self._fold(*self._running_whitening())
            sampling, blocks = self._sampling(x)
            x, count, mean, cov, whiten = self._estimate_whitening(x, sampling, blocks)
            shift, left = mean, whiten
            if sampling.taps == 1 and self._is_larger_than(x):
                x, shift, left = *whiten_pixels(x, mean, whiten, blocks), {}
            weight, bias = self._fold(shift, left)
            if self.track_running_stats and not _in_backward():
                self._update_running(count, mean, cov, bias)
            return x, weight, bias

    def _is_larger_than(self, x: torch.Tensor) -> bool:
        """Whether the weight is more than the map, which then is cheaper to whiten, as it lies."""
        return x.is_contiguous() and x.numel() < self.weight.numel()

    def _estimate_whitening(
        self, x: torch.Tensor, sampling: Sampling, blocks: Blocks
    ) -> tuple[torch.Tensor, int | torch.Tensor, torch.Tensor, Matrices, Matrices]:
        """x, patches looked at, their mean (C*T,), covariances and whitening matrices by axis."""
        together = self.sync_stats and several_processes()
        count = count_patches(x, sampling)
        alone = not together and isinstance(sampling, PatchGrid)
        if alone and self._has_few_rows(count):
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
        vectors = self.blocks.to_vectors("joint", maps - mean)
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
        total = torch.linalg.vector_norm(bias, 1, dtype=mean.dtype)
        if not (isinstance(count, int) and count):  # none, or perhaps none in all processes
            total = total / count
        usable = total < math.inf  # not for NaN either, or for anything divided by 0
        if self.momentum is None:  # the plain mean of all batches, see `recalibrate`
            step = 1 / (self.num_batches_tracked + 1)
        else:
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
        weight, bias = fold(self.to_conv_layout(weight), bias, mean.to(dtype), whiten, self.blocks)
        return self.to_conv_layout(weight).to(self.weight.dtype), bias.to(self.weight.dtype)

    def to_conv_layout(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as rows for each output channel, (out, C, *kernel), and back again."""
        return weight

    @torch.no_grad()
    def _folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the plain layer that this one is in evaluation."""
        with full_precision(self.weight.device):
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
        rows, (mean, whiten) = self.to_conv_layout(self.weight), self._running_whitening()
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
