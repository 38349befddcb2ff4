"""Mean and covariance of sampled patches (Ye et al., ICLR 2020, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import Blocks, transform_along
from .gathering import gather_centred, memory_order, scatter, select_pixels, weigh_pixels
from .matmul import outer_products, saves_launches, scaled_transform
from .once import differentiable_once
from .patches import Patches, PatchSubset, Sampling
from .precision import in_full_products

# Bytes of patches in memory at a time. A CPU keeps as many in its cache, from gathering to product.
CPU_CHUNK, CHUNK = 4 << 20, 256 << 20
# Bytes of patches up to which the backward pass keeps them, not gathers them again.
CPU_KEPT, KEPT = 2 << 20, 8 << 20


class Statistics(NamedTuple):
    """First and second moments of patches along one axis."""

    images: Tensor  # N C H W
    patches: int | Tensor  # patches of the grid on all images, sampled or not
    mean: Tensor  # C*T, of all patches of the grid
    cov: Tensor  # G d d, of the sampled patches
    centre: Tensor  # C*T, mean of the patches that this rank samples


def mean_and_covariance(
    patches: Patches,
    blocks: Blocks,
    axis: str = "joint",
    whitened: tuple[str, Tensor] | None = None,
    symmetric_grad: bool = False,
) -> Statistics:
    """Return mean and covariance of patches.

        mu = mean_p x_p,    Cov = mean v v^T  of the vectors v that `axis` makes of x_p - mu

    Patches are gathered in chunks of images, forward and again backward, unless few. They are
    centred before the product: E[x x^T] - mu mu^T would cancel in float32.

    The mean covers all patches of the grid, also where the covariance samples a subset. A patch has
    one row in the mean, but a row per block in a shared covariance: a subset would leave noise in
    the mean.

    NOTE (differs from the published code): each block keeps its own mean. A mean pooled over blocks
    would leave features off centre, and their offsets inside the covariance.

    Args:
        patches: (N, C, *size) images, and which of their patches to take.
        blocks: the view of a patch as blocks.
        axis: "joint", "channel" or "pixel", see `Blocks.to_vectors`.
        whitened: an axis and its matrices (G, d, d) that whiten the patches first.
        symmetric_grad: the gradient of the covariance is symmetric, as `inverse_sqrt` returns it.
            The backward pass then has two launches less. Any other gradient would give wrong
            gradients of the images.

    Returns:
        Statistics in at least float32, 0 for no patches at all. Pass its `images` to the
        convolution: the gradient of the statistics is then added to that of the convolution in
        place, without a second map of gradients.

    Raises:
        ValueError: images are smaller than the kernel.
    """
    before, matrix = whitened or ("", None)
    x, sampling = patches
    settings = before, sampling, blocks, axis, symmetric_grad
    x, centre, cov, *mean = _MeanAndCovariance.apply(x, matrix, *settings)
    return Statistics(x, patches.grid_count, mean[0] if mean else centre, cov, centre)


class _MeanAndCovariance(torch.autograd.Function):
    """Moments with their gradients.

    For the gradient A of the covariance, that of v is (A + A^T) v / M: one product. To first order
    the covariance does not depend on the mean, so no gradient passes through the centring.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix: Tensor | None,
        before: str,
        sampling: Sampling,
        blocks: Blocks,
        axis: str,
        symmetric_grad: bool,
    ) -> tuple[Tensor, ...]:
        ctx.settings = before, sampling, blocks, axis, symmetric_grad
        ctx.patches = max(Patches(x, sampling).samples, 1)
        ctx.set_materialize_grads(False)
        selection = select_pixels(x, sampling)
        chunks = list(_split(x, x, sampling))
        grid = sampling.grid if isinstance(sampling, PatchSubset) else sampling
        gathered = None
        if len(chunks) == 1:
            gathered, centre = gather_centred(x, sampling, selection)
        else:
            centre = _average_pixels(x, weigh_pixels(x, grid))
        needs_mean = grid is not sampling and matrix is None
        weights = weigh_pixels(x, grid) if needs_mean else None
        ctx.rows = ctx.patches * len(centre) // (blocks.matrices * blocks.side(axis))
        cov: Tensor | None = None
        for part, _ in chunks:
            maps = gathered
            if maps is None:
                maps, _ = gather_centred(part, sampling, selection, centre)
            if matrix is not None:
                maps = transform_along(before, maps, matrix, blocks)
            vectors = blocks.to_vectors(axis, maps)
            # Pooled over the blocks that share a matrix: they are further rows of `vectors`.
            product = outer_products(vectors, vectors, blocks.matrices, 1 / ctx.rows)
            cov = product if cov is None else cov + product
        assert cov is not None  # one chunk at least
        kept = gathered if keeps_patches(Patches(x, sampling)) else None
        ctx.save_for_backward(x, matrix, centre, kept, weights, *selection)
        mean = () if weights is None else (_average_pixels(x, weights),)
        return x, centre, cov, *mean

    @staticmethod
    @differentiable_once
    @in_full_products
    def backward(
        ctx: Any,
        grad: Tensor | None,
        grad_centre: Tensor | None,
        grad_cov: Tensor | None,
        grad_mean: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        x, matrix, centre, kept, weights, *selection = ctx.saved_tensors
        before, sampling, blocks, axis, symmetric_grad = ctx.settings
        grad = x.new_zeros(x.shape) if grad is None else _make_writable(grad)
        if grad_cov is None:
            grad_cov = centre.new_zeros(blocks.matrices, *(blocks.side(axis),) * 2)
        if not symmetric_grad:
            grad_cov = (grad_cov + grad_cov.mT) / 2
        grad_matrix = None if matrix is None else torch.zeros_like(matrix)
        for part, grad_part in _split(x, grad, sampling):
            maps = kept
            if maps is None:
                maps, _ = gather_centred(part, sampling, selection, centre)
            vectors = maps if matrix is None else transform_along(before, maps, matrix, blocks)
            slope = scaled_transform(grad_cov, blocks.to_vectors(axis, vectors), 2 / ctx.rows)
            slope = blocks.from_vectors(axis, slope, maps.shape)
            if grad_matrix is not None:
                left, right = (blocks.to_vectors(before, each) for each in (slope, maps))
                grad_matrix += outer_products(left, right, blocks.matrices)
                slope = transform_along(before, slope, matrix.mT, blocks)
            if grad_centre is not None:
                slope.add_(grad_centre[:, None], alpha=1 / ctx.patches)
            scatter(slope, grad_part, sampling, selection)
        if grad_mean is not None:
            _add_to_every_image(grad, grad_mean.unflatten(0, (x.shape[1], -1)), weights)
        return grad, grad_matrix, None, None, None, None, None


def second_moment(maps: Tensor, axis: str, blocks: Blocks) -> Tensor:
    """Return mean v v^T, (G, d, d), of the vectors along an axis of maps (R, groups * C*T, P)."""
    vectors = blocks.to_vectors(axis, maps)
    count = vectors.shape[0] * vectors.shape[2]
    same = vectors.view_as(vectors)  # Dynamo rejects one tensor as two arguments of a Function
    return outer_products(vectors, same, blocks.matrices, 1 / max(count, 1))


def move_centre(stats: Statistics, mean: Tensor, axis: str, blocks: Blocks) -> Statistics:
    """Return the statistics about another mean (C*T,); its distance counts as variance."""
    offset = (stats.mean - mean)[None, :, None]
    return stats._replace(mean=mean, cov=stats.cov + second_moment(offset, axis, blocks))


def centre_rows(stats: Statistics, patches: Patches, blocks: Blocks) -> Tensor:
    """Return the centred vectors of F features, (G, rows, F), that the covariance consists of."""
    x, sampling = stats.images, patches.sampling
    maps, _ = gather_centred(x, sampling, select_pixels(x, sampling), stats.mean)
    vectors = blocks.to_vectors("joint", maps).unflatten(1, (blocks.matrices, -1))  # R G F L
    return vectors.permute(1, 0, 3, 2).flatten(1, 2)


def keeps_patches(patches: Patches) -> bool:
    """Return True if the gathered patches are few enough to keep for the backward pass."""
    if isinstance(patches.sampling, PatchSubset):
        return True
    kept = KEPT if saves_launches(patches.images.device) else CPU_KEPT
    return len(patches.images) * patches.bytes_per_image <= kept


def _average_pixels(x: Tensor, weights: Tensor) -> Tensor:
    """Return the mean (C*T,) of all patches of a grid on x, by `weigh_pixels`; 0 for no images."""
    contiguous = memory_order(x) is torch.contiguous_format
    images = x if contiguous else x.movedim(1, -1)  # a CPU is ten times slower across memory
    average = images.mean if len(x) else images.sum
    image = average(0, dtype=weights.dtype)
    image = image.flatten(1) if contiguous else image.flatten(0, -2).mT  # C pixels
    return (image @ weights.mT).flatten()


def _add_to_every_image(grad: Tensor, taps: Tensor, weights: Tensor) -> None:
    """Add the gradient taps @ weights / N of the mean of all patches, the adjoint of its average.

    Args:
        grad: (N, C, *size), changed in place.
        taps: (C, T), gradient of the mean.
        weights: (T, pixels), from `weigh_pixels`.
    """
    share = 1 / max(len(grad), 1)
    if saves_launches(grad.device) and grad.dtype == weights.dtype:
        taps, weights = (factor.expand(len(grad), -1, -1) for factor in (taps, weights))
        grad.view(*taps.shape[:2], weights.shape[2]).baddbmm_(taps, weights, alpha=share)
        return
    image = (taps @ weights).reshape(1, *grad.shape[1:])
    if not saves_launches(grad.device):  # a CPU is slow with two dtypes or orders of memory
        image = image.to(grad.dtype, memory_format=memory_order(grad))
    grad.add_(image, alpha=share)


def _split(x: Tensor, grad: Tensor, sampling: Sampling) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield x and grad in chunks of images whose patches fit into memory or cache."""
    patches = Patches(x, sampling)
    chunk = CHUNK if saves_launches(x.device) else CPU_CHUNK
    count = max(chunk // max(patches.bytes_per_image, 1), 1)
    if keeps_patches(patches) or len(x) <= count:
        yield x, grad
        return
    for first in range(0, len(x), count):
        yield x[first : first + count], grad[first : first + count]


def _make_writable(grad: Tensor) -> Tensor:
    """Return the gradient, copied where its elements may share memory or a compiler is at work."""
    dense = grad.is_contiguous() or memory_order(grad) is not torch.contiguous_format
    if dense and not torch.compiler.is_compiling():
        return grad
    return grad.clone(memory_format=torch.contiguous_format)
