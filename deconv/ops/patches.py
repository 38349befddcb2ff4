"""Positions of the patches that a convolution sees: a grid, or a subset of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

Slices = tuple[Any, ...]  # a slice per spatial dimension


@dataclass(frozen=True)
class PatchGrid:
    """A regular grid of patches.

    Args:
        kernel_size: in pixels, per spatial dimension.
        stride: distance of two patches, in input pixels.
        dilation: distance of two taps, in input pixels.
        padding: zero pixels before and after, last dimension first, as `torch.nn.functional.pad`
            takes them. Negative numbers crop.
        spread: zero-insertion factor of a transposed convolution, 1 for none. Two neighbouring
            pixels of the image lie `spread` pixels apart. The other arguments count pixels of this
            wider image. Each spread has no divisor in common with its stride.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    spread: tuple[int, ...] = ()  # empty: 1 per dimension

    def __post_init__(self) -> None:
        if not self.spread:
            object.__setattr__(self, "spread", (1,) * len(self.kernel_size))

    @property
    def taps(self) -> int:
        """Pixels per patch, T."""
        return prod(self.kernel_size)

    @property
    def stays_inside(self) -> bool:
        """Return True if every tap meets a pixel at every position."""
        return not any(pad > 0 for pad in self.padding) and max(self.spread) == 1

    def positions(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the number of patches along each dimension of an unpadded image of `size`.

        Raises:
            ValueError: the image is smaller than the kernel.
        """
        counts = []
        for d, n in enumerate(size):
            span = (self.kernel_size[d] - 1) * self.dilation[d] + 1
            padded = max((n - 1) * self.spread[d] + 1, 0) + sum(self.padding[-2 - 2 * d :][:2])
            if padded < span:
                raise ValueError(
                    f"input of {(*size,)} pixels, padding {self.padding}, is smaller "
                    f"than the kernel {self.kernel_size}"
                )
            counts.append((padded - span) // self.stride[d] + 1)
        return tuple(counts)

    def count(self, size: Sequence[int]) -> int:
        """Return the number of patches per image of `size`, P."""
        return prod(self.positions(size))

    def split_taps(self, size: Sequence[int]) -> Iterator[tuple[int, Slices, Slices]]:
        """Yield each tap, the positions where the tap meets a pixel, and these pixels."""
        sides = zip(size, self.positions(size), strict=True)
        dims = [self._split_dimension(d, *side) for d, side in enumerate(sides)]
        for tap, pairs in enumerate(product(*dims)):
            yield tap, tuple(where for where, _ in pairs), tuple(pixels for _, pixels in pairs)

    def _split_dimension(self, d: int, pixels: int, positions: int) -> list[tuple[slice, slice]]:
        """List for each tap along dimension d the positions that meet pixels, and the pixels."""
        step, spread, before = self.stride[d], self.spread[d], self.padding[-2 - 2 * d]
        pairs = []
        for k in range(self.kernel_size[d]):
            first = k * self.dilation[d] - before  # wider pixel under the tap at position 0
            low = max(0, -(first // step))
            low += -(low * step + first) * pow(step, -1, spread) % spread if spread > 1 else 0
            count = min(
                (positions - 1 - low) // spread + 1,
                (pixels - 1 - (low * step + first) // spread) // step + 1,
            )
            start, count = (low * step + first) // spread, max(count, 0)
            where = slice(low, low + count * spread, spread)
            pairs.append((where, slice(start, start + count * step, step)))
        return pairs


@dataclass(frozen=True)
class PatchSubset:
    """Sparse patch positions that differ from image to image.

    Neighbouring patches of an image are nearly equal. A few patches of every image inform more than
    many patches of a few images. The patches of an image are spread evenly over the grid. Their
    offset differs from image to image: consecutive images cover all positions.

    Args:
        grid: the positions to choose from.
        per_image: patches per image, from 1 to all.
        first: index of the first image in the batch of all ranks.
    """

    grid: PatchGrid
    per_image: int
    first: int = 0

    @property
    def taps(self) -> int:
        """Pixels per patch, T."""
        return self.grid.taps

    def count(self, size: Sequence[int]) -> int:
        """Return the number of patches per image."""
        return self.per_image

    def choose(self, count: int, size: Sequence[int], device: torch.device) -> Tensor:
        """Return the chosen grid positions for `count` images of `size`, (count, per_image)."""
        positions = self.grid.count(size)
        # A step near the golden section spreads the offsets of few images evenly.
        step = max(int(0.618 * positions), 1)
        while gcd(step, positions) > 1:
            step += 1
        images = torch.arange(self.first, self.first + count, device=device)
        spread = torch.arange(self.per_image, device=device) * positions // self.per_image
        return (images[:, None] * step + spread) % positions


Sampling = PatchGrid | PatchSubset


class Patches(NamedTuple):
    """The sampled patches of a batch of images, gathered only when they are needed."""

    images: Tensor  # N C H W, any number of spatial dimensions
    sampling: Sampling

    @property
    def samples(self) -> int:
        """Number of sampled patches, M."""
        return len(self.images) * self.sampling.count(self.images.shape[2:])

    @property
    def grid_count(self) -> int:
        """Number of patches of the whole grid, sampled or not."""
        grid = self.sampling.grid if isinstance(self.sampling, PatchSubset) else self.sampling
        return len(self.images) * grid.count(self.images.shape[2:])

    @property
    def bytes_per_image(self) -> int:
        """Memory of the gathered patches of one image."""
        _, channels, *size = self.images.shape
        numbers = channels * self.sampling.taps * self.sampling.count(size)
        return max(self.images.element_size(), 4) * numbers


def sample(x: Tensor, sampling: Sampling) -> Patches:
    """Sample patches of x as `sampling` says.

    Args:
        x: (N, C, *size), any number of spatial dimensions.
        sampling: a regular grid, or a subset of one.
    """
    return Patches(x, sampling)
