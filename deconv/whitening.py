"""The base class of all layers: whitening by batch or running statistics, in four named steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, SupportsFloat
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed, nn

from .dialects import read_published
from .freezing import Freezing, in_backward
from .input_norm import InputNorm, NormalizedLayer
from .ops.blocks import Blocks
from .ops.covariance import Statistics, centre_rows, mean_and_covariance
from .ops.fold import fold
from .ops.inverse_sqrt import MAX_STEPS, MAX_STEPS_FROM_ROWS, inverse_sqrt
from .ops.normalize import EPS, INPUT_NORMS, normalize_samples
from .ops.patches import Patches, PatchGrid, Sampling, sample
from .ops.precision import autocasts, full_precision
from .reuse import reuse
from .running import Update, are_usable, collect, per_patch, settle, weigh_batch
from .sync import BatchShare, GroupHandle, find_share, pool_statistics, require_group

Matrices = dict[str, Tensor]  # (G, d, d) by axis
_last_shares: WeakKeyDictionary[nn.Module, BatchShare | None] = WeakKeyDictionary()  # not pickled


class Whitening(Freezing):
    """A layer that whitens its input by folding the whitening into its weight and bias.

    `fold_whitening` is the method: sample patches, take their mean and covariance, take the inverse
    square root of the covariance, fold both into weight and bias. Subclasses apply the result.

    A subclass is also a layer of torch (`nn.Conv2d`, `nn.Linear`). It calls `init_whitening` and
    defines `prepare_input`, `choose_patches` and `forward`.

    Buffers: `running_mean` (C*T,), for every whitened axis `running_cov_<axis>` (G, d, d), and
    `num_batches_tracked`. They stay float32 in half-precision models. The first batch replaces the
    initial values. A layer without a batch acts as the plain layer: mean 0 and D = I.
    `freeze` adds the buffer `freeze_steps`, see `Freezing`.

    NOTE (differs from the published code): running averages are of covariances, not of D, as
    BatchNorm averages variances. While covariances move, the mean of their roots whitens less well
    than the root of their mean.
    """

    weight: Tensor
    bias: Any  # Tensor | None; the layers of torch declare it differently
    running_mean: Tensor | None
    num_batches_tracked: Tensor | None
    root: str
    replaces_initial = True  # the first batch replaces the initial running statistics
    pads_with_mean = False  # True: the mean is subtracted before padding, not folded
    _group: GroupHandle | None = None
    input_norm: str
    input_norm_eps = EPS
    sample_dims: int  # dimensions of a sample, see `normalize_samples`

    def fold_whitening(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, and the weight and bias that act on x as the layer's own on whitened patches.

            y = W D (x - mu) + b = (W D) x + (b - W D mu)             (ICLR 2020, Algorithm 1)

        Convolve the returned x, not the argument, see `mean_and_covariance`.

        Args:
            x: (N, C, *size), from `prepare_input`.

        Raises:
            ValueError: the dtypes of x and weight differ outside autocast, or torch.func transforms
                a layer that uses batch statistics.
        """
        self._check_dtype(x)
        settle(self)
        with full_precision(x.device):
            if self.uses_running_stats:
                return x, *self._fold(*self._reused_whitening())
            _refuse_transforms(self)
            x, count, mean, cov, whiten = self.batch_whitening(x)
            weight, bias = self._fold(mean, whiten)
            if self.track_running_stats and not in_backward():
                self._update_running(count, mean, cov, bias)
        return x, weight, bias

    @property
    def uses_running_stats(self) -> bool:
        """Return True if this forward uses the running statistics, not those of its batch."""
        if self.training:
            return self.freeze and self.frozen
        return self.track_running_stats

    def batch_whitening(self, x: Tensor) -> tuple[Tensor, int | Tensor, Tensor, Matrices, Matrices]:
        """Return x, the number of patches, mu (C*T,), and Cov and D of the batch by axis.

        Mode 1 has two axes. Patches whitened along the first axis are whitened along the second.
        A gradient of Cov must be symmetric, see `mean_and_covariance`.
        """
        sampling, blocks = self.choose_patches(x)
        means: list[Tensor] = []
        covs: Matrices = {}
        whiten: Matrices = {}
        whitened: tuple[str, Tensor] | None = None
        share = self.find_share()
        for axis in self.axes:
            patches = sample(x, sampling)
            stats = mean_and_covariance(patches, blocks, axis, whitened, symmetric_grad=True)
            if share is not None:
                reference = self.running_patch_mean()
                stats = pool_statistics(stats, blocks, axis, whitened, reference, share.group)
            stats = self.recentre(stats, blocks, axis)
            few_rows = share is None and self._has_few_rows(patches)
            rows = centre_rows(stats, patches, blocks) if few_rows else None
            whiten[axis] = inverse_sqrt(stats.cov, self.n_iter, self.root, self.eps, rows)
            covs[axis] = stats.cov
            means.append(stats.mean)
            x, whitened = stats.images, (axis, whiten[axis])
        return x, stats.patches, means[0], covs, whiten

    def recentre(self, stats: Statistics, blocks: Blocks, axis: str) -> Statistics:
        """Return the statistics about the mean that the layer subtracts: unchanged here."""
        return stats

    def _check_dtype(self, x: Tensor) -> None:
        """Raise ValueError for a dtype that torch's layer refuses, before statistics change."""
        kinds = {x.dtype, self.weight.dtype}
        casts = x.is_floating_point() and torch.float64 not in kinds and autocasts(x.device)
        if len(kinds) == 1 or casts:
            return
        raise ValueError(
            f"input is {x.dtype} and the layer is {self.weight.dtype}: convert one of them, for "
            f"example by x.to({self.weight.dtype})"
        )

    def check_input(self, x: Tensor) -> Tensor:
        """Return the prepared input on the meta device; raise ValueError if x is invalid."""
        self._check_dtype(x)
        if not self.freezes_next:
            _refuse_transforms(self)
        return self.prepare_input(torch.empty(x.shape, dtype=x.dtype, device="meta"))

    def prepare_input(self, x: Tensor) -> Tensor:
        """Return the layer's input as (N, C, *size), checked, normalised and padded."""
        raise NotImplementedError

    def centre_input(self, x: Tensor) -> Tensor:
        """Subtract the mean from a prepared input, if the layer `pads_with_mean`."""
        return x

    def normalize_input(self, x: Tensor) -> Tensor:
        """Normalise each sample of the input by its own statistics, as set by `input_norm`."""
        return normalize_samples(x, self.input_norm, self.sample_dims, self.input_norm_eps)

    def choose_patches(self, x: Tensor) -> tuple[Sampling, Blocks]:
        """Return the patches of a prepared input that the mode samples, and their blocks."""
        raise NotImplementedError

    def to_conv_layout(self, weight: Tensor) -> Tensor:
        """Convert the weight to (out, C, *kernel), or back: the method is its own inverse."""
        return weight

    def init_whitening(
        self,
        axes: tuple[str, ...],
        blocks: Blocks,
        *,
        mean_taps: int,
        eps: float,
        n_iter: int,
        momentum: float | None,
        sync_stats: bool,
        process_group: distributed.ProcessGroup | None,
        track_running_stats: bool,
        input_norm: str,
        freeze: bool,
        freeze_iter: int,
    ) -> None:
        """Check the options that all layers share, and register the buffers.

        Args:
            axes: axes to whiten, in order: "joint", "channel" or "pixel".
            blocks: the view of the layer's features.
            mean_taps: number of taps with a separate mean, 1 or T.
            eps: as in `FastDeconv`, like all further arguments.
            n_iter: Newton-Schulz steps.
            momentum: weight of a batch in the running statistics; None: the mean of all batches.
            sync_stats: share the batch statistics between ranks.
            process_group: ranks that share; None: those of the active DistributedDataParallel.
            track_running_stats: keep running statistics.
            input_norm: normalisation of each sample before patches are taken.
            freeze: use running statistics in nine tenths of the training steps.
            freeze_iter: steps with batch statistics in a cycle.

        Raises:
            ValueError: an option is out of range.
        """
        if not self.weight.is_floating_point():
            raise ValueError(f"dtype must be a real floating-point type, got {self.weight.dtype}")
        flags = {"shared": blocks.shared, "sync_stats": sync_stats, "freeze": freeze}
        flags["track_running_stats"] = track_running_stats
        for name, flag in flags.items():
            if not isinstance(flag, bool):  # "no" counts as True
                raise ValueError(f"{name} must be True or False, got {flag!r}")
        if not (isinstance(eps, SupportsFloat) and 0 < eps < math.inf):
            raise ValueError(f"eps must be above 0 and finite (units of variance), got {eps!r}")
        if n_iter not in range(1, MAX_STEPS + 1):
            raise ValueError(f"n_iter must be a whole number, 1 to {MAX_STEPS} steps, got {n_iter}")
        if momentum is not None and not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], or None, got {momentum}")
        require_choice("input_norm", input_norm, INPUT_NORMS)
        self.axes, self.blocks = axes, blocks
        self.eps, self.n_iter = eps, n_iter
        self.momentum, self.input_norm = momentum, input_norm
        self.sync_stats, self.track_running_stats = sync_stats, track_running_stats
        self.process_group = process_group
        like: Any = {"device": self.weight.device}
        like["dtype"] = torch.promote_types(self.weight.dtype, torch.float32)
        buffers = self.make_statistics(mean_taps, **like)
        buffers["num_batches_tracked"] = torch.tensor(0, device=self.weight.device)
        for name, value in buffers.items():
            self.register_buffer(name, value if track_running_stats else None)
        self.init_freeze(freeze, freeze_iter)

    def make_statistics(self, mean_taps: int, **like: Any) -> dict[str, Tensor]:
        """Return the initial running statistics by buffer name."""
        count = self.blocks.groups * self.blocks.channels * mean_taps
        buffers = {"running_mean": torch.zeros(count, **like)}
        for axis in self.axes:
            identity = torch.eye(self.blocks.side(axis), **like)
            buffers[f"running_cov_{axis}"] = identity.repeat(self.blocks.matrices, 1, 1)
        return buffers

    @property
    def process_group(self) -> distributed.ProcessGroup | None:
        """Return the group over which the layer shares statistics; None: see `FastDeconv`."""
        return None if self._group is None else self._group.group

    @process_group.setter
    def process_group(self, group: distributed.ProcessGroup | None) -> None:
        require_group("process_group", group)
        self._group = None if group is None else GroupHandle(group)

    def find_share(self) -> BatchShare | None:
        """Return the ranks that share the batch statistics; None for this rank alone.

        Activation checkpointing recomputes the forward outside DistributedDataParallel. The ranks
        are then those of the layer's last forward.
        """
        if not self.sync_stats:
            return None
        if in_backward() and self in _last_shares:
            return _last_shares[self]
        share = find_share(self.process_group)
        if not torch.compiler.is_compiling():
            _last_shares[self] = share
        return share

    def _has_few_rows(self, patches: Patches) -> bool:
        """Return True if the root is cheaper from rows than from the covariance."""
        most_steps = {"newton": MAX_STEPS_FROM_ROWS, "resolvent": MAX_STEPS, "cholesky": 0}
        works = self.axes == ("joint",) and self.n_iter <= most_steps[self.root]
        on_grid = isinstance(patches.sampling, PatchGrid)
        rows = patches.samples * self.blocks.sharing
        return works and on_grid and 0 < 2 * rows < self.blocks.features

    def running_patch_mean(self) -> Tensor | None:
        """Return the running mean of patches, (C*T,), or None."""
        return self.running_mean

    def require_running_mean(self) -> Tensor:
        """Return the running mean of patches, (C*T,), or raise ValueError."""
        if (mean := self.running_patch_mean()) is None:
            raise ValueError(f"{self} has no running statistics: set track_running_stats=True")
        return mean

    def running_covariances(self) -> Matrices:
        """Return the running covariances by axis."""
        return {axis: getattr(self, f"running_cov_{axis}") for axis in self.axes}

    @torch.no_grad()
    def running_whitening(self) -> tuple[Tensor, Matrices]:
        """Return mu and D of the running statistics, as copies independent of the buffers.

        Raises:
            ValueError: there are no running statistics.
        """
        settle(self)
        mean = self.require_running_mean()
        assert self.num_batches_tracked is not None
        seen, whiten = self.num_batches_tracked > 0, {}
        for axis, cov in self.running_covariances().items():
            cov = cov.to(torch.promote_types(cov.dtype, torch.float32))
            matrix = inverse_sqrt(cov, self.n_iter, self.root, self.eps)
            identity = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
            whiten[axis] = torch.where(seen, matrix, identity)
        return mean.clone(), whiten

    def _reused_whitening(self) -> tuple[Tensor, Matrices]:
        """Return mu and D of the running statistics; D may serve several forwards, see `reuse`."""
        settle(self)
        mean = self.require_running_mean()
        assert self.num_batches_tracked is not None
        settings = self.n_iter, self.root, self.eps
        sources = [self.num_batches_tracked, *self.running_covariances().values()]
        whiten = reuse(self, settings, sources, lambda: self.running_whitening()[1])
        return mean.clone(), whiten

    @torch.no_grad()
    def _update_running(
        self, count: int | Tensor, mean: Tensor, covs: Matrices, bias: Tensor
    ) -> None:
        """Update the running statistics; skip empty or non-finite batches, see `Update`."""
        assert self.num_batches_tracked is not None
        news = mean, *covs.values()
        if collect(Update(self, count, bias, news)):
            return
        norm = torch.linalg.vector_norm(bias, 1, dtype=mean.dtype)
        usable = are_usable(per_patch(norm, count))
        step = weigh_batch(self.num_batches_tracked, self.momentum, self.replaces_initial, mean)
        for old, new in zip(self.running_buffers(), news, strict=True):
            old.lerp_(torch.where(usable, new.to(old.dtype), old), step.to(old.dtype))
        self.num_batches_tracked += usable

    def running_buffers(self) -> tuple[Tensor, ...]:
        """Return the running mean and the running covariances."""
        assert self.running_mean is not None
        return self.running_mean, *self.running_covariances().values()

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Reset the running statistics to mean 0 and D = I, which the next batch replaces.

        The cycle of `freeze` restarts with batch statistics.
        """
        settle(self)
        if self.running_mean is None or self.num_batches_tracked is None:
            return
        self.running_mean.zero_()
        for cov in self.running_covariances().values():
            cov.copy_(torch.eye(cov.shape[-1], device=cov.device))
        self.num_batches_tracked.zero_()
        if self.freeze:
            self.freeze_steps.zero_()
            self._steps = 0

    def reset_parameters(self) -> None:
        """Reset parameters as torch does, and the running statistics (after `to_empty`, say)."""
        super().reset_parameters()  # type: ignore[misc]  # of the layer of torch
        if hasattr(self, "track_running_stats"):  # torch's constructor calls this method earlier
            self.reset_running_stats()

    def _fold(self, mean: Tensor, whiten: Matrices) -> tuple[Tensor, Tensor]:
        """Fold mean and whitening into weight and bias, in the precision of the statistics."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        whiten = {axis: matrix.to(dtype) for axis, matrix in whiten.items()}
        weight, bias = fold(self.to_conv_layout(weight), bias, mean.to(dtype), whiten, self.blocks)
        return self.to_conv_layout(weight).to(self.weight.dtype), bias.to(self.weight.dtype)

    @torch.no_grad()
    def _fold_running(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the plain layer that equals this layer in evaluation."""
        with full_precision(self.weight.device):
            return self._fold(*self.running_whitening())

    def whitened_weight(self) -> Tensor:
        """Return W D with the running statistics, the kernel that acts on (normalised) input."""
        return self._fold_running()[0]

    @torch.no_grad()
    def whitening_kernels(self) -> Tensor:
        """Return D with the running statistics as kernels (groups * C*T, C, *kernel).

        Kernel n maps raw input to the n-th whitened feature of a patch. Features are numbered as in
        `weight.flatten(1)`, group by group.
        """
        rows = self.to_conv_layout(self.weight)
        with full_precision(rows.device):
            mean, whiten = self.running_whitening()
            whiten = {axis: matrix.to(mean) for axis, matrix in whiten.items()}
            single = torch.eye(rows[0].numel(), dtype=mean.dtype, device=mean.device)
            single = single.reshape(-1, *rows.shape[1:])
            single = single.repeat(self.blocks.groups, *[1] * (rows.dim() - 1))
            return fold(single, None, mean, whiten, self.blocks)[0]

    def _fuse_into(self, plain: nn.Module) -> nn.Module:
        """Return `plain` with the folded weight and bias, and this layer's mode and forward hooks.

        With `input_norm`, return a `NormalizedLayer` that contains `plain`.

        Raises:
            ValueError: a hook computes the weight or the bias, or the layer is sharded.
        """
        refuse_sharded(self, "Fuse")
        if {"weight", "bias"} & vars(self).keys():
            raise ValueError(
                f"a hook computes weight or bias of {self}: remove the hook first "
                "(prune.remove, remove_weight_norm), which makes them permanent"
            )
        weight, bias = self._fold_running()
        with torch.no_grad():
            weight = torch.empty_like(self.weight).copy_(weight)  # keeps the memory format
        learned = self.weight.requires_grad
        plain.weight = nn.Parameter(weight, learned)
        plain.bias = nn.Parameter(bias, learned if self.bias is None else self.bias.requires_grad)
        if self.input_norm != "none":
            norm = InputNorm(self.input_norm, self.sample_dims, self.input_norm_eps)
            plain = NormalizedLayer(norm, plain)
        plain.__dict__.update(forward_hooks(self))
        return plain.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Apply a conversion such as `to` or `half`, but keep the statistics at least float32.

        Variances overflow in half precision, and their averages stop moving.
        """
        settle(self)
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self._widen_buffers(before)
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        settle(self)
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Load a state_dict, published ones included, and keep statistics at least float32.

        Statistics that the layer cannot reproduce, or that are incomplete, are an error even with
        strict=False.
        """
        settle(self)
        try:
            self.read_statistics(state_dict, prefix)
            require_all_statistics(self, state_dict, prefix)
        except ValueError as error:
            errors.append(f"{prefix[:-1] or 'the layer'} ({type(self).__name__}): {error}")
            return
        report = (strict, missing, unexpected, errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, *report)
        self._widen_buffers(self._buffers)
        self.read_freeze_steps()

    def read_statistics(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Convert published running statistics in a state_dict to those of this layer.

        Raises:
            ValueError: the layer cannot reproduce the published statistics.
        """
        read_published(self, state_dict, prefix)

    def _widen_buffers(self, source: dict[str, Tensor | None]) -> None:
        """Replace half-precision buffers by those of `source` in float32."""
        for name, new in self._buffers.items():
            old = source[name]
            if new is None or old is None:
                continue
            if new.is_floating_point() and new.dtype.itemsize < 4:
                self._buffers[name] = old.to(new.device, torch.float32)

    def _whitening_repr(self, block: int) -> str:
        size = self.blocks.size
        text = f"{size}" if size == block else f"{size} (largest divisor up to {block})"
        return (
            f"block={text}, layout={self.layout}, shared={self.shared}, "
            f"eps={self.eps}, n_iter={self.n_iter}, momentum={self.momentum}"
            + ("" if self.sync_stats else ", sync_stats=False")
            + ("" if self._group is None else f", process_group of {self._group.group.size()}")
            + ("" if self.track_running_stats else ", track_running_stats=False")
            + ("" if self.input_norm == "none" else f", input_norm={self.input_norm}")
            + (f", freeze=True, freeze_iter={self.freeze_iter}" if self.freeze else "")
        )


def require_all_statistics(layer: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise ValueError if a state_dict contains some running statistics of a layer, but not all."""
    names = [
        name for name, buffer in layer.named_buffers(recurse=False) if name.startswith("running_")
    ]
    missing = [name for name in names if prefix + name not in state_dict]
    if missing and len(missing) < len(names):
        found = ", ".join(name for name in names if name not in missing)
        raise ValueError(
            f"the checkpoint has {found} without {', '.join(missing)}: load all running "
            "statistics, or remove them all"
        )


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def require_positive(**counts: int) -> None:
    """Raise ValueError that names the first count below 1."""
    for name, count in counts.items():
        if not count >= 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def refuse_sharded(model: nn.Module, verb: str) -> None:
    """Raise ValueError if a parameter is sharded; `verb` starts the remedy."""
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor":
            raise ValueError(
                f"{name} is a DTensor, sharded by fully_shard or similar. {verb} the model before "
                "sharding, or a plain model with the full state_dict"
            )


def _refuse_transforms(layer: nn.Module) -> None:
    """Raise ValueError inside a transform of torch.func, such as `vmap` or `grad`."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise ValueError(
            "batch statistics do not support torch.func: call eval() on the model, or use "
            f"torch.autograd.grad instead, for {layer}"
        )


def forward_hooks(module: nn.Module) -> dict[str, Any]:
    """Return copies of the attributes that hold a module's forward hooks."""
    return {name: copy(value) for name, value in vars(module).items() if "_forward_" in name}
