"""Patches -> their mean and regularised covariance, of one process or of all together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from .blocks import Blocks, transform_along
from .matmul import outer_products
from .patches import PatchSubset, Sampling, gather, scatter, select_pixels, weigh_pixels

# Bytes of patches that lie in memory at a time. On a CPU they then stay in its cache from their
# gathering to their product; elsewhere large products matter more.
CPU_PART, PART = 8 << 20, 256 << 20
FEW = 2 << 20  # bytes of patches that are kept for the backward, instead of being gathered again


def measure_patches(
    x: torch.Tensor,
    sampling: Sampling,
    blocks: Blocks,
    axis: str,
    before: tuple[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Mean of patches of x, and their covariance along an axis.

        mu = mean_p x_p,    Cov = mean v v^T  of the vectors v that `axis` makes of x_p - mu

    Patches are gathered some images at a time, forward and, unless they are few enough to be kept
    (FEW), again backward; centred before the product (E[xx^T] - mu mu^T would cancel in float32).

    NOTE (differs from the published code): blocks that share a matrix keep a mean each. Pooling the
    means too leaves features off centre and their offsets inside the covariance.

    Args:
        x: (N, C, *size), any number of spatial dimensions.
        sampling: which patches are looked at.
        blocks, axis: how a patch falls into vectors of d features, see `Blocks.to_vectors`.
        before: an axis and its matrices by which the patches are whitened before the covariance.

    Returns:
        x again, mean (C*T,) in float32 or float64, 0 for no patches at all, and covariance
        (G, d, d). Give this x, and not the argument, to the convolution: the gradient of the
        statistics is then added to that of the convolution where it lies, instead of filling a
        feature map of its own with it. Of spots, unless `before` is given, the mean of all patches
        of their window comes last, from one pass over x without gathering any: a covariance has as
        many rows of a patch as blocks share it, a mean has one, so patches that suffice for the one
        leave noise in the other, and that costs accuracy.

    Raises:
        ValueError: x is smaller than the kernel.
    """
    done, matrix = (None, None) if before is None else before
    return _MeasurePatches.apply(x, matrix, done, sampling, blocks, axis)


class _MeasurePatches(torch.autograd.Function):
    """For the gradient A of the covariance, that of v is (A + A^T) v / M: one product.

    The covariance does not change to first order when the mean is off, so no gradient goes through
    the centring. In the last line of the backward that of the mean joins in.
    """

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        matrix: torch.Tensor | None,
        done: str | None,
        sampling: Sampling,
        blocks: Blocks,
        axis: str,
    ) -> tuple[torch.Tensor, ...]:
        selection, parts = select_pixels(x, sampling), _split(x, sampling)
        ctx.patches = max(count_patches(x, sampling), 1)
        whole = gather(x, sampling, selection) if len(parts) == 1 else None
        mean = _average_pixels(x, weigh_pixels(x, sampling)) if whole is None else _average(whole)
        mean, cov = mean[:, None], None
        ctx.vectors = ctx.patches * len(mean) // (blocks.matrices * blocks.side(axis))
        for part in parts:
            maps = gather(part, sampling, selection) if whole is None else whole
            maps = maps.sub_(mean)
            if matrix is not None:
                maps = transform_along(done, maps, matrix, blocks)
            vectors = blocks.to_vectors(axis, maps)
            products = outer_products(vectors, vectors, blocks.matrices, 1 / ctx.vectors)
            cov = products if cov is None else cov + products  # not in place: see _sum_products
        kept = whole if keeps_patches(x, sampling) else None
        of_all = isinstance(sampling, PatchSubset) and matrix is None
        weights = weigh_pixels(x, sampling.window) if of_all else None
        ctx.save_for_backward(x, matrix, mean, kept, weights, *selection)
        ctx.settings = done, sampling, blocks, axis
        ctx.set_materialize_grads(False)  # of few patches nobody asks for the mean
        means = (_average_pixels(x, weights),) if of_all else ()
        return x, mean.flatten(), cov, *means

    @staticmethod
    @once_differentiable
    def backward(
        ctx,
        grad: torch.Tensor | None,
        grad_mean: torch.Tensor | None,
        grad_cov: torch.Tensor | None,
        *grad_of_all: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        x, matrix, mean, kept, weights, *selection = ctx.saved_tensors
        done, sampling, blocks, axis = ctx.settings
        grad = x.new_zeros(x.shape) if grad is None else _make_own(grad)
        if grad_cov is None:
            grad_cov = mean.new_zeros(blocks.matrices, *(blocks.side(axis),) * 2)
        symmetric = (grad_cov + grad_cov.mT) / ctx.vectors
        grad_matrix = None if matrix is None else torch.zeros_like(matrix)
        for part, grad_part in zip(_split(x, sampling), _split(grad, sampling), strict=True):
            maps = gather(part, sampling, selection).sub_(mean) if kept is None else kept
            whitened = maps
            if matrix is not None:
                whitened = transform_along(done, maps, matrix, blocks)
            slope = transform_along(axis, whitened, symmetric, blocks)
            if matrix is not None:
                pair = (blocks.to_vectors(done, each) for each in (slope, maps))
                grad_matrix += outer_products(*pair, blocks.matrices)
                slope = transform_along(done, slope, matrix.mT, blocks)
            if grad_mean is not None:
                slope.add_(grad_mean[:, None], alpha=1 / ctx.patches)
            scatter(slope, grad_part, sampling, selection)
        for each in grad_of_all:  # one at most
            if each is not None:
                pixels = each.unflatten(0, (x.shape[1], -1)) @ weights
                grad.add_(pixels.reshape(x.shape[1:]))
        return grad, grad_matrix, *(None,) * 4


def count_patches(x: torch.Tensor, sampling: Sampling) -> int:
    """Patches of x that are looked at, M."""
    return len(x) * sampling.count(x.shape[2:])


def _average_pixels(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The mean (C*T,) of the patches of x from what its pixels add to it, see `weigh_pixels`."""
    return (x.sum(0, dtype=weights.dtype).flatten(1) @ weights.mT).flatten()


def _average(maps: torch.Tensor) -> torch.Tensor:
    """The mean (C*T,) of patches (N', C*T, P'), 0 for none."""
    if not maps.numel():
        return maps.sum((0, 2))
    # Both at once is one kernel on a GPU, but ten times slower on a CPU where P' is short.
    return maps.mean(0).mean(1) if maps.device.type == "cpu" else maps.mean((0, 2))


def second_moment(maps: torch.Tensor, axis: str, blocks: Blocks) -> torch.Tensor:
    """Mean v v^T of the vectors along an axis of maps (R, groups * C*T, P): (G, d, d)."""
    vectors = blocks.to_vectors(axis, maps)
    count = vectors.shape[0] * vectors.shape[2]
    return outer_products(vectors, vectors, blocks.matrices, 1 / max(count, 1))


def _is_whole(x: torch.Tensor) -> bool:
    """Whether every element of a feature map has a place of its own, and spots find theirs."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))


def _make_own(grad: torch.Tensor) -> torch.Tensor:
    """A gradient to write to: itself, where that can be. A compiler needs no thrift of ours."""
    if _is_whole(grad) and not torch.compiler.is_compiling():
        return grad
    return grad.clone(memory_format=torch.contiguous_format)


def keeps_patches(x: torch.Tensor, sampling: Sampling) -> bool:
    """Whether patches are so few that the backward finds them kept, and need not gather again."""
    return isinstance(sampling, PatchSubset) or len(x) * _measure_image(x, sampling) <= FEW


def _split(x: torch.Tensor, sampling: Sampling) -> Sequence[torch.Tensor]:
    """x, some images at a time: so many that their patches fill a part of the memory."""
    if isinstance(sampling, PatchSubset):  # few
        return (x,)
    part = CPU_PART if x.device.type == "cpu" else PART
    count = max(part // max(_measure_image(x, sampling), 1), 1)
    if len(x) <= count:  # as below, but a compiler need not know how many there are
        return (x,)
    return [x[first : first + count] for first in range(0, max(len(x), 1), count)]


def _measure_image(x: torch.Tensor, sampling: Sampling) -> int:
    """Bytes of the patches of a image."""
    patches = x.shape[1] * sampling.taps * sampling.count(x.shape[2:])
    return max(x.element_size(), 4) * patches
