"""Gather sampled patches, and add gradients back to their pixels.

Two layouts hold the patches of N images, with C*T features and P patches per image:

    CPU    (N, C*T, P)       reads one image after the other from its cache
    GPU    (1, C*T, P * N)   joins all images: blocks that share a matrix are a view, not a copy
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .constants import Constants, cache_constants
from .matmul import add_product, multiply, saves_launches
from .patches import PatchGrid, PatchSubset, Sampling

SMALL = 128  # pixels of an image up to which a product with a 0-1 matrix gathers fastest

Selection = Constants


def number_pixels(grid: PatchGrid, size: Sequence[int], device: torch.device) -> Tensor:
    """Return the index of the pixel under each tap at each position, (T, P).

    Padding, and zeros between spread pixels, have the index prod(size).
    """
    pixels = torch.arange(prod(size), device=device).reshape(*size)
    numbers = pixels.new_full((grid.taps, *grid.positions(size)), prod(size))
    for tap, where, under in grid.split_taps(size):
        numbers[tap][where] = pixels[under]
    return numbers.flatten(1)


def select_pixels(x: Tensor, sampling: Sampling) -> Selection:
    """Return the constant tensors by which `gather` and `scatter` find the pixels of patches.

    For a subset of a grid: pixel indices, (N, 1, T*P) on a CPU and (1, T*P, N) on a GPU. Where some
    taps may lie in the padding, a mask of the same shape follows, and on a GPU the weights of
    `gather_centred`. For a grid on small images: a 0-1 matrix (pixels, T*P), as a product is faster
    than strided copies. For all other grids: nothing.

    Args:
        x: (N, C, *size).
        sampling: the patches.
    """
    count, _, *size = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(sampling, PatchSubset):
        if saves_launches(x.device):
            return _index_joined_subset(sampling, count, tuple(size), dtype, like=x)
        return _index_subset(sampling, count, tuple(size), like=x)
    if prod(size) > SMALL or prod(size) * sampling.taps == 1:
        return ()
    return _make_gather_matrix(sampling, tuple(size), dtype, like=x)


@cache_constants
def _index_subset(
    subset: PatchSubset, count: int, size: tuple[int, ...], device: torch.device
) -> Selection:
    pixels = _number_chosen(subset, count, size, device)
    return _mask_padding(pixels.transpose(0, 1).flatten(1)[:, None], subset, size)


@cache_constants
def _index_joined_subset(
    subset: PatchSubset,
    count: int,
    size: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Selection:
    pixels = _number_chosen(subset, count, size, device)
    constants = _mask_padding(pixels.transpose(1, 2).contiguous().flatten(0, 1)[None], subset, size)
    for mask in constants[1:]:
        share = mask.view(subset.taps, -1, 1).to(dtype) / max(count * subset.per_image, 1)
        constants += (torch.cat([share, -share], dim=2),)  # T P*N 2
    return constants


def _number_chosen(
    subset: PatchSubset, count: int, size: tuple[int, ...], device: torch.device
) -> Tensor:
    """Return the pixel numbers (T, N, P) of the chosen patches."""
    return number_pixels(subset.grid, size, device)[:, subset.choose(count, size, device)]


def _mask_padding(pixels: Tensor, subset: PatchSubset, size: tuple[int, ...]) -> Selection:
    """Return valid pixel numbers and, where some taps may lie in the padding, a mask."""
    if subset.grid.stays_inside:
        return (pixels,)
    inside = pixels < prod(size)
    return torch.where(inside, pixels, 0), inside


@cache_constants
def _make_gather_matrix(
    grid: PatchGrid, size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Selection:
    numbers = number_pixels(grid, size, device).flatten()
    pixels = torch.arange(prod(size), device=device)
    return ((pixels[:, None] == numbers).to(dtype),)


@cache_constants
def _make_mean_weights(
    grid: PatchGrid, size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Selection:
    weights = torch.zeros(grid.taps, *size, dtype=dtype, device=device)
    for tap, _, pixels in grid.split_taps(size):
        weights[tap][pixels] = 1 / grid.count(size)
    return (weights.flatten(1),)


def weigh_pixels(x: Tensor, grid: PatchGrid) -> Tensor:
    """Return the weights by which pixels enter the mean of each tap over all patches.

    Args:
        x: (N, C, *size).
        grid: the patches.

    Returns:
        (T, pixels), at least float32: 1 / P where the tap meets the pixel, else 0.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return _make_mean_weights(grid, tuple(x.shape[2:]), dtype, like=x)[0]


def gather(x: Tensor, sampling: Sampling, selection: Selection) -> Tensor:
    """Return the sampled patches of x (N, C, *size) in new memory, in the layout of the device.

    Features are channel-major, as in `weight.flatten(1)`; float32 at least.

    Args:
        x: (N, C, *size).
        sampling: the patches.
        selection: `select_pixels(x, sampling)`.

    Raises:
        ValueError: x is smaller than the kernel.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    count, channels, *size = x.shape
    joined, positions = saves_launches(x.device), sampling.count(size)
    if isinstance(sampling, PatchSubset):
        patches = _gather_pixels(x, selection[0])
        for mask in selection[1:2]:
            patches *= mask
    elif selection:
        images, matrix = x.to(dtype).flatten(2), selection[0]
        factors = matrix.mT.expand(channels, -1, -1), images.permute(1, 2, 0)
        patches = multiply(*factors) if joined else multiply(images, matrix)
    else:
        make = x.new_empty if sampling.stays_inside else x.new_zeros
        shape = (channels, sampling.taps, count) if joined else (count, channels, sampling.taps)
        patches = make(*shape, *sampling.positions(size), dtype=dtype)
        by_image = patches.movedim(2, 0) if joined else patches
        for tap, where, under in sampling.split_taps(size):
            at, below = (..., *where), (..., *under)
            by_image[:, :, tap][at] = x[below]
    maps, length = (1, count * positions) if joined else (count, positions)
    return patches.reshape(maps, channels * sampling.taps, length)


def gather_centred(
    x: Tensor, sampling: Sampling, selection: Selection, centre: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sampled patches minus their mean, and the mean (C*T,), 0 for no patches.

    On a GPU the mask of the padding takes no launch of its own: the mean is a product with masked
    weights, and one operation masks and centres.

    Args:
        x: (N, C, *size).
        sampling: the patches.
        selection: `select_pixels(x, sampling)`.
        centre: subtracted in place of the mean, (C*T,).
    """
    if _is_pixel(sampling, x.shape[2:]):  # a difference needs no copy
        images = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
        if saves_launches(x.device):
            images = images.transpose(0, 1).flatten(1)[None]
        centre = _average(images) if centre is None else centre
        return images - centre[:, None], centre
    if centre is not None or len(selection) < 3:
        patches = gather(x, sampling, selection)
        centre = _average(patches) if centre is None else centre
        return patches.sub_(centre[:, None]), centre
    pixels, mask, weights = selection
    taps, rows, _ = weights.shape
    patches = _gather_pixels(x, pixels).view(x.shape[1], taps, rows)  # C T P*N
    means = patches.new_empty(len(patches), taps, 2)  # the weights hold both signs of the mean
    means.transpose(0, 1).baddbmm_(patches.transpose(0, 1), weights, beta=0)
    patches = torch.addcmul(means[..., 1:], patches, mask.view(taps, rows))
    return patches.flatten(0, 1)[None], means[..., 0].flatten()


def scatter(patches: Tensor, x: Tensor, sampling: Sampling, selection: Selection) -> None:
    """Add every element of `patches` to its pixel of x, in place: the adjoint of `gather`.

    Args:
        patches: in the layout of `gather`. Of a subset, zeros are written where a tap lies in the
            padding.
        x: (N, C, *size).
        sampling: the patches.
        selection: `select_pixels(x, sampling)`.
    """
    count, channels, *size = x.shape
    joined, images = saves_launches(x.device), x.view(count, channels, prod(size))
    if isinstance(sampling, PatchSubset):
        aligned, dim, pixels = _align(images, selection[0])
        patches = patches.reshape(pixels.shape)
        for mask in selection[1:2]:
            patches *= mask
        if joined or memory_order(x) is torch.contiguous_format:
            aligned.scatter_add_(dim, pixels, patches.to(x.dtype))
        else:
            # Pixels are rows of memory. In bfloat16, scatter_add_ would convert all images.
            first = prod(size) * torch.arange(count, device=x.device)  # row of each image
            rows = (selection[0][:, 0] + first[:, None]).flatten()
            patches = patches.mT.reshape(-1, channels).to(x.dtype)
            images.mT.view(-1, channels).index_add_(0, rows, patches)
    elif selection:
        matrix = selection[0]
        if joined:
            patches = patches.reshape(channels, matrix.shape[1], count)
            add_product(images.permute(1, 2, 0), matrix.expand(channels, -1, -1), patches)
        else:
            images += patches.reshape(count, channels, matrix.shape[1]) @ matrix.mT
    else:
        shape = (channels, sampling.taps, count) if joined else (count, channels, sampling.taps)
        patches = patches.reshape(*shape, *sampling.positions(size))
        by_image = patches.movedim(2, 0) if joined else patches
        for tap, where, under in sampling.split_taps(size):
            at, below = (..., *where), (..., *under)
            x[below].add_(by_image[:, :, tap][at])


def memory_order(x: Tensor) -> torch.memory_format:
    """Return the channels-last format if x (N, C, *size) has it, else the contiguous format."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _is_pixel(sampling: Sampling, size: Sequence[int]) -> bool:
    """Return True if the only patch of an image is its only pixel."""
    grid = isinstance(sampling, PatchGrid) and sampling.stays_inside
    return grid and prod(size) * sampling.taps == sampling.count(size) == 1


def _align(images: Tensor, pixels: Tensor) -> tuple[Tensor, int, Tensor]:
    """Return images (N, C, pixels) in the order of their patches, and the dimension of pixels.

    The pixel indices of a subset are returned for all channels.
    """
    channels = images.shape[1]
    if saves_launches(images.device):
        return images.permute(1, 2, 0), 1, pixels.expand(channels, -1, -1)
    return images, 2, pixels.expand(-1, channels, -1)


def _gather_pixels(x: Tensor, pixels: Tensor) -> Tensor:
    """Return the pixels under all taps, those that stand for padding too; float32 at least."""
    images, dim, pixels = _align(x.flatten(2), pixels)
    return images.gather(dim, pixels).to(torch.promote_types(x.dtype, torch.float32))


def _average(patches: Tensor) -> Tensor:
    """Return the mean (C*T,) of patches in the layout of the device, 0 for none."""
    if not patches.numel():
        return patches.sum((0, 2))
    # On a CPU a mean over both dimensions at once is slow where P is short.
    return patches.mean((0, 2)) if saves_launches(patches.device) else patches.mean(0).mean(1)
