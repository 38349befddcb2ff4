"""Feature map -> the patches a convolution sees; and their gradient back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, prod

import torch

from .matmul import is_traced, keep_last

SMALL = 128  # pixels of a map up to which a product gathers faster than copies of lines do
LONG = 512  # pixels of a line from which on single pixels are copied

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class PatchGrid:
    """Which patches are looked at, per spatial dimension.

    Args:
        kernel_size: in pixels.
        stride: distance of two patches, in input pixels.
        dilation: distance of two taps, in input pixels.
        padding: pixels of zeros, as `torch.nn.functional.pad` takes them: before and after, for the
            last dimension first. Negative ones leave pixels out.
        spread: distance of two pixels of the map in the map that is looked at, which has zeros
            between them: what a transposed convolution sees. It has no divisor in common with the
            stride. All of the above counts the pixels of this wider map.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    spread: tuple[int, ...] = ()  # none: 1 along each dimension

    def __post_init__(self) -> None:
        if not self.spread:
            object.__setattr__(self, "spread", (1,) * len(self.kernel_size))

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
            padded = max((n - 1) * self.spread[d] + 1, 0) + sum(self.padding[-2 - 2 * d :][:2])
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

    def cut(self, dims: int) -> tuple[PatchGrid, PatchGrid]:
        """The window of the first `dims` dimensions and that of the others."""
        last = len(self.padding) - 2 * dims
        sides = self.kernel_size, self.stride, self.dilation
        outer, inner = ([each[part] for each in sides] for part in (slice(dims), slice(dims, None)))
        return (
            PatchGrid(*outer, self.padding[last:], self.spread[:dims]),
            PatchGrid(*inner, self.padding[:last], self.spread[dims:]),
        )

    def _meet(self, d: int, pixels: int, positions: int) -> list[tuple[slice, slice]]:
        """Of each tap along dimension d: the positions within the map, and the pixels there."""
        step, spread, before = self.stride[d], self.spread[d], self.padding[-2 - 2 * d]
        met = []
        for k in range(self.kernel_size[d]):
            first = k * self.dilation[d] - before  # what position 0 sees, in the wider map
            low = max(0, -(first // step))
            low += -(low * step + first) * pow(step, -1, spread) % spread if spread > 1 else 0
            count = min(
                (positions - 1 - low) // spread + 1,
                (pixels - 1 - (low * step + first) // spread) // step + 1,
            )
            start, count = (low * step + first) // spread, max(count, 0)
            met.append(
                (
                    slice(low, low + count * spread, spread),
                    slice(start, start + count * step, step),
                )
            )
        return met


@dataclass(frozen=True)
class PatchSubset:
    """Some of the positions of a window, in every image others.

    Neighbouring patches of a image are nearly the same patch, so few patches of every image
    tell more than many patches of a few. Those of a image are spread evenly over it, and begin
    elsewhere in each one: images that follow each other see all positions before long.

    Args:
        window: whose positions are meant.
        per_image: patches of a image, from 1 to all.
        first: number of the first image, where several processes share a batch.
    """

    window: PatchGrid
    per_image: int
    first: int = 0

    @property
    def taps(self) -> int:
        """Pixels of a patch, T."""
        return self.window.taps

    def count(self, size: Sequence[int]) -> int:
        """Patches of a map."""
        return self.per_image

    def choose(self, count: int, size: Sequence[int], device: torch.device) -> torch.Tensor:
        """The positions (count, per_image) by number in each of `count` maps of `size`."""
        positions = self.window.count(size)
        # Near the golden section of the positions, so that few turns already spread evenly.
        turn = max(int(0.618 * positions), 1)
        while gcd(turn, positions) > 1:
            turn += 1
        images = torch.arange(self.first, self.first + count, device=device)
        spread = torch.arange(self.per_image, device=device) * positions // self.per_image
        return (images[:, None] * turn + spread) % positions


Sampling = PatchGrid | PatchSubset
Selection = tuple[torch.Tensor, ...]


def select_pixels(x: torch.Tensor, sampling: Sampling) -> Selection:
    """What `gather` and `scatter` find the pixels by; the same for all x of one shape and device.

    Of a window, the matrix (pixels, T*P) of zeros and ones that gathers patches by a product. Its
    transpose scatters them. Matrices multiply so much faster than single pixels are fetched that
    the zeros are paid for. It is that of the whole map if that is small, otherwise of its lines;
    for very long lines, and for single pixels of large maps, there is none.

    Of spots, the numbers (N, 1, T*P) of their pixels, and where some of them may lie in the
    padding, which do not.

    Args:
        x: (N, C, *size).
    """
    count, _, *size = x.shape
    if isinstance(sampling, PatchGrid):
        count, outer = 0, _count_outer(size, sampling)
        size, (_, sampling) = size[outer:], sampling.cut(outer)
        longest = SMALL if sampling.taps == 1 else LONG
        if prod(size) > longest or prod(size) * sampling.taps == 1:
            return ()
    make = _select if is_traced(x) else _cached_selection
    dtype = torch.promote_types(x.dtype, torch.float32)
    return make(sampling, count, tuple(size), dtype, device=x.device)


def _select(
    sampling: Sampling,
    count: int,
    size: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Selection:
    if isinstance(sampling, PatchSubset):
        return _number_pixels(sampling, count, size, device)
    single = torch.eye(prod(size), dtype=dtype, device=device)  # a image for each pixel
    maps = single.new_zeros(len(single), 1, sampling.taps, *sampling.positions(size))
    for tap, pixels in _match(maps, single.reshape(-1, 1, *size), sampling):
        tap.copy_(pixels)
    return (maps.flatten(1),)


def _number_pixels(
    spots: PatchSubset, count: int, size: Sequence[int], device: torch.device
) -> Selection:
    window = spots.window
    numbers = spots.choose(count, size, device)[:, None]  # N 1 P
    places = torch.unravel_index(numbers, window.positions(size))
    taps = torch.unravel_index(torch.arange(window.taps, device=device), window.kernel_size)
    pixel, inside = torch.zeros_like(numbers), torch.ones_like(numbers, dtype=torch.bool)
    for d, (place, tap) in enumerate(zip(places, taps, strict=True)):
        before = window.padding[-2 - 2 * d]
        at = place * window.stride[d] + tap[:, None] * window.dilation[d] - before  # N T P
        inside = inside & (at >= 0) & (at < size[d] * window.spread[d])
        at, between = at // window.spread[d], at % window.spread[d] > 0
        pixel, inside = pixel * size[d] + at, inside & ~between
    found = torch.where(inside, pixel, 0), inside
    always = not any(pad > 0 for pad in window.padding) and max(window.spread) == 1
    found = found[:1] if always else found
    return tuple(each.flatten(1)[:, None] for each in found)


_cached_selection = keep_last(128, _select)


def weigh_pixels(x: torch.Tensor, window: PatchGrid) -> torch.Tensor:
    """What each pixel of x (N, C, *size) adds to the mean of each tap over all patches.

    Returns:
        (T, pixels), float32 at least: 1 / (N P) where a tap meets a pixel, else 0.
    """
    make = _weigh_pixels if is_traced(x) else _cached_weights
    dtype = torch.promote_types(x.dtype, torch.float32)
    return make(window, len(x), tuple(x.shape[2:]), dtype, device=x.device)


def _weigh_pixels(
    window: PatchGrid, count: int, size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    weights = torch.zeros(window.taps, *size, dtype=dtype, device=device)
    for tap, _, pixels in window.split_taps(size):
        weights[(tap, *pixels)] = 1 / max(count * window.count(size), 1)
    return weights.flatten(1)


_cached_weights = keep_last(128, _weigh_pixels)


def gather(x: torch.Tensor, sampling: Sampling, selection: Selection = ()) -> torch.Tensor:
    """Maps (N', C * T, P') of all patches of x (N, C, *size): in new memory, float32 at least.

    Their features are channel-major as in `weight.flatten(1)`. In large maps all positions but
    those along a line stand with the images: N' P' = N P.

    Args:
        selection: `select_pixels(x, sampling)`; none copies.

    Raises:
        ValueError: x is smaller than the kernel.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(sampling, PatchSubset):
        pixels, *inside = selection or select_pixels(x, sampling)
        maps = x.flatten(2).gather(2, pixels.expand(-1, x.shape[1], -1)).to(dtype)
        for mask in inside:
            maps *= mask
        return maps.reshape(len(x), x.shape[1] * sampling.taps, sampling.per_image)
    outer, inner = sampling.cut(_count_outer(x.shape[2:], sampling))
    lines = x.to(dtype)
    if outer.kernel_size:
        views = _new_lines(lines, outer)
        for line, pixels in _match(views, lines, outer):
            line.copy_(pixels)
        lines = _as_images(views, outer)
    size = lines.shape[2:]
    shape = len(lines), lines.shape[1] * inner.taps, inner.count(size)
    if selection:
        return (lines.flatten(2) @ selection[0]).reshape(shape)
    maps = lines.new_zeros(*lines.shape[:2], inner.taps, *inner.positions(size))
    for tap, pixels in _match(maps, lines, inner):
        tap.copy_(pixels)
    return maps.reshape(shape)


def scatter(
    maps: torch.Tensor, x: torch.Tensor, sampling: Sampling, selection: Selection = ()
) -> None:
    """The adjoint of `gather`: add every element of maps to its pixel of x, in place.

    Of spots, maps are written to as well: 0 where a tap lies in the padding.
    """
    if isinstance(sampling, PatchSubset):
        pixels, *inside = selection or select_pixels(x, sampling)
        pixels = pixels.expand(-1, x.shape[1], -1)
        maps = maps.reshape(pixels.shape)
        for mask in inside:
            maps *= mask
        x.view(*x.shape[:2], prod(x.shape[2:])).scatter_add_(2, pixels, maps.to(x.dtype))
        return
    outer, inner = sampling.cut(_count_outer(x.shape[2:], sampling))
    views = _new_lines(maps, outer, x.shape) if outer.kernel_size else None
    lines = x if views is None else _as_images(views, outer)
    size = lines.shape[2:]
    if selection:
        (matrix,) = selection
        maps = maps.reshape(*lines.shape[:2], len(matrix.mT))
        lines += (maps @ matrix.mT).reshape(lines.shape)
    else:
        maps = maps.reshape(*lines.shape[:2], inner.taps, *inner.positions(size))
        for tap, pixels in _match(maps, lines, inner):
            pixels += tap
    if views is not None:
        for line, pixels in _match(views, x, outer):
            pixels += line


def _count_outer(size: Sequence[int], window: PatchGrid) -> int:
    """Dimensions whose taps are copied as whole lines: none of a small map, else all but one."""
    return 0 if prod(size) <= SMALL or window.taps == 1 else len(size) - 1


def _new_lines(
    like: torch.Tensor, outer: PatchGrid, shape: Sequence[int] | None = None
) -> torch.Tensor:
    """Zeros (N, C, T, *positions, line) for maps of `shape`: a view, laid out as images."""
    count, channels, *size, line = like.shape if shape is None else shape
    positions = outer.positions(size)
    dims = range(1, 1 + len(positions))
    lines = like.new_zeros(count, *positions, channels, outer.taps, line)
    return lines.permute(0, len(dims) + 1, len(dims) + 2, *dims, len(dims) + 3)


def _as_images(lines: torch.Tensor, outer: PatchGrid) -> torch.Tensor:
    """(N, C, T, *positions, line) as maps (N * P, C * T, line)."""
    dims = range(3, 3 + len(outer.kernel_size))
    return lines.permute(0, *dims, 1, 2, -1).flatten(0, len(dims)).flatten(1, 2)


def _match(
    maps: torch.Tensor, x: torch.Tensor, window: PatchGrid
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each tap the part of maps (N, C, T, *positions, ...) and the pixels of x that it sees."""
    for tap, where, pixels in window.split_taps(x.shape[2 : 2 + len(window.kernel_size)]):
        both = slice(None), slice(None)
        yield maps[(*both, tap, *where)], x[(*both, *pixels)]
