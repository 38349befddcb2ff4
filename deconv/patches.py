"""Feature map -> the patches a convolution sees; and their gradient back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch

SMALL = 128  # pixels of a map up to which a product gathers faster than copies do
LOOKS = 4  # windows that share the pictures of a batch: each costs a round of small operations

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Window:
    """Which patches are looked at, per spatial dimension.

    Args:
        kernel_size: in pixels.
        stride: distance of two patches, in input pixels.
        dilation: distance of two taps, in input pixels.
        padding: pixels of zeros, as `torch.nn.functional.pad` takes them: before and after, for the
            last dimension first. Negative ones leave pixels out.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def taps(self) -> int:
        """Pixels of a patch, T."""
        return prod(self.kernel_size)

    def positions(self, size: Sequence[int]) -> tuple[int, ...]:
        """Patches along each dimension of a map of `size` without its padding.

        Raises:
            ValueError: the map is smaller than the kernel.
        """
        found = []
        for d, n in enumerate(size):
            span = (self.kernel_size[d] - 1) * self.dilation[d] + 1
            padded = n + sum(self.padding[-2 - 2 * d :][:2])
            if padded < span:
                raise ValueError(
                    f"input of {(*size,)} pixels, padding {self.padding}, is smaller "
                    f"than the kernel {self.kernel_size}"
                )
            found.append((padded - span) // self.stride[d] + 1)
        return tuple(found)

    def count(self, size: Sequence[int]) -> int:
        """Patches of a map of `size`, P."""
        return prod(self.positions(size))

    def split_taps(self, size: Sequence[int]) -> Iterator[tuple[int, Slices, Slices]]:
        """Each tap by number, the positions where it meets a pixel, and these pixels."""
        sides = zip(size, self.positions(size), strict=True)
        dims = [self._meet(d, *side) for d, side in enumerate(sides)]
        for tap, met in enumerate(product(*dims)):
            yield tap, tuple(where for where, _ in met), tuple(pixels for _, pixels in met)

    def _meet(self, d: int, pixels: int, positions: int) -> list[tuple[slice, slice]]:
        """Of each tap along dimension d: the positions within the map, and the pixels there."""
        step, before = self.stride[d], self.padding[-2 - 2 * d]
        met = []
        for k in range(self.kernel_size[d]):
            first = k * self.dilation[d] - before  # the pixel that position 0 sees
            low = max(0, -(first // step))
            high = max(low, min(positions, (pixels - 1 - first) // step + 1))
            start = low * step + first
            met.append((slice(low, high), slice(start, start + (high - low) * step, step)))
        return met

    def thin_out(self, steps: Sequence[int], corner: Sequence[int]) -> Window:
        """Every so-many-th position along each dimension, beginning at `corner`."""
        stride = tuple(s * step for s, step in zip(self.stride, steps, strict=True))
        padding = list(self.padding)
        for d, (s, first) in enumerate(zip(self.stride, corner, strict=True)):
            padding[-2 - 2 * d] -= s * first
        return Window(self.kernel_size, stride, self.dilation, tuple(padding))


def share_out(
    window: Window, size: Sequence[int], share: int, offset: int = 0
) -> list[tuple[slice, Window]]:
    """One in `share` of all patches of a batch: which pictures are seen through which window.

    Patches of one picture are alike, so many pictures with few patches each tell more than the
    reverse. The pictures take turns with up to `LOOKS` windows, each of which has positions of its
    own, that together are all; only then pictures are left out.

    Args:
        size: of the maps, in pixels.
        share: 1 for all.
        offset: number of the first picture, where several processes share a batch.
    """
    positions = window.positions(size)
    steps = [1] * len(positions)
    while 2 * prod(steps) <= min(share, LOOKS):
        d = max(range(len(steps)), key=lambda d: positions[d] / steps[d])
        if positions[d] < 2 * steps[d]:
            break
        steps[d] *= 2
    turns = share // prod(steps)
    every = turns * prod(steps)
    return [
        (slice((turn * turns - offset) % every, None, every), window.thin_out(steps, corner))
        for turn, corner in enumerate(product(*map(range, steps)))
    ]


def select_pixels(x: torch.Tensor, window: Window) -> torch.Tensor | None:
    """The matrix (H*W, T*P) of zeros and ones that gathers the patches of a small map by a product.

    Its transpose scatters them. Matrices multiply so much faster than single pixels are fetched
    that the zeros are paid for; for large maps they are not, and there is none.

    Args:
        x: (N, C, *size).
    """
    size = x.shape[2:]
    if prod(size) > SMALL:
        return None
    dtype = torch.promote_types(x.dtype, torch.float32)
    single = torch.eye(prod(size), dtype=dtype, device=x.device)  # a picture for each pixel
    return gather(single.reshape(-1, 1, *size), window).flatten(1)


def gather(x: torch.Tensor, window: Window, selection: torch.Tensor | None = None) -> torch.Tensor:
    """Maps (N, C * T, P) of all patches of x (N, C, *size), channel-major as `weight.flatten(1)`.

    Args:
        selection: `select_pixels(x, window)`, for a product in the place of copies.

    Returns:
        New memory, in float32 or float64.

    Raises:
        ValueError: x is smaller than the kernel.
    """
    (count, channels, *size), taps = x.shape, window.taps
    dtype = torch.promote_types(x.dtype, torch.float32)
    positions = window.positions(size)
    shape = count, channels * taps, prod(positions)
    if selection is not None:
        return (x.flatten(2).to(dtype) @ selection).reshape(shape)
    maps = x.new_zeros(count, channels, taps, *positions, dtype=dtype)
    for tap, where, pixels in window.split_taps(size):
        maps[(slice(None), slice(None), tap, *where)] = x[(..., *pixels)]
    return maps.reshape(shape)


def scatter(
    maps: torch.Tensor, x: torch.Tensor, window: Window, selection: torch.Tensor | None = None
) -> None:
    """The adjoint of `gather`: add every element of maps to its pixel of x, in place."""
    (count, channels, *size), taps = x.shape, window.taps
    if selection is not None:
        x += (maps.reshape(count, channels, len(selection.mT)) @ selection.mT).reshape(x.shape)
        return
    maps = maps.reshape(count, channels, taps, *window.positions(size))
    for tap, where, pixels in window.split_taps(size):
        x[(..., *pixels)] += maps[(slice(None), slice(None), tap, *where)]
