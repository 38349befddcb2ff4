"""Sampled patches against loops and torch's im2col."""

import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from deconv.ops import constants, gathering
from deconv.ops.constants import cache_constants
from deconv.ops.gathering import gather as gather_patches
from deconv.ops.gathering import scatter, select_pixels
from deconv.ops.patches import PatchGrid, PatchSubset
from tests.pairwise import loop_over, pairwise

SHAPES = [
    # kernel, stride, dilation, size
    ((3, 3), (1, 1), (1, 1), (7, 8)),
    ((3, 3), (3, 3), (1, 1), (9, 10)),
    ((2, 5), (2, 1), (1, 2), (8, 13)),
    ((1, 1), (4, 4), (1, 1), (5, 5)),
    ((4, 2), (6, 9), (2, 1), (11, 9)),
    ((3, 4), (2, 3), (2, 1), (12, 13)),  # more pixels than SMALL
    ((2, 3), (1, 7), (1, 3), (2, 530)),
    ((3, 3), (2, 2), (1, 1), (2, 1)),  # smaller than the kernel but for its padding
]


def gather(x, sampling, selection=None):
    selection = select_pixels(x, sampling) if selection is None else selection
    return gather_patches(x, sampling, selection)


PADDINGS = [(1, 2, 3, 1), (4, 4, 4, 4)]
CASES = pairwise(SHAPES, PADDINGS, [False, True])


@loop_over(("shape", "padding", "by_product"), CASES)
def test_patches_equal_im2col(shape, padding, by_product):
    kernel, stride, dilation, size = shape
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    grid = PatchGrid(kernel, stride, dilation, padding)
    selection = select_pixels(x, grid) if by_product else ()
    expected = F.unfold(F.pad(x, padding), kernel, dilation=dilation, stride=stride)  # N C*T L
    torch.testing.assert_close(gather(x, grid, selection), expected, rtol=0, atol=0)
    assert grid.count(size) == expected.shape[2]


@loop_over(("shape", "padding", "by_product"), CASES)
def test_scatter_is_the_adjoint_of_gather(shape, padding, by_product):
    kernel, stride, dilation, size = shape
    x, y = torch.randn(2, 2, 6, *size, dtype=torch.float64)
    grid = PatchGrid(kernel, stride, dilation, padding)
    maps = torch.randn_like(gather(x, grid))
    before = y.clone()
    scatter(maps, y, grid, select_pixels(x, grid) if by_product else ())
    torch.testing.assert_close((maps * gather(x, grid)).sum(), ((y - before) * x).sum())


def test_patches_equal_a_loop_over_positions():
    x = torch.arange(2 * 2 * 5 * 6, dtype=torch.float64).reshape(2, 2, 5, 6)
    maps = gather(x, PatchGrid((3, 2), (2, 3), (1, 1), (0, 0, 0, 0)))
    expected = [
        image[:, top : top + 3, left : left + 2].flatten()
        for image in x
        for top in (0, 2)
        for left in (0, 3)
    ]
    torch.testing.assert_close(maps.transpose(1, 2).flatten(0, 1), torch.stack(expected))


@pytest.mark.parametrize("dims", [1, 3])
def test_other_numbers_of_dimensions(dims):
    x = torch.randn(2, 4, *(6,) * dims)
    grid = PatchGrid((3,) * dims, (3,) * dims, (1,) * dims, (0, 0) * dims)
    for selection in ((), select_pixels(x, grid)):
        maps = gather(x, grid, selection)
        assert maps.shape[1] == 4 * 3**dims and maps.numel() == x.numel()
        torch.testing.assert_close(
            maps[0, :, 0].reshape(4, *(3,) * dims), x[(0, ..., *[slice(3)] * dims)]
        )


@pytest.mark.parametrize("size", [(6, 7), (20, 7), (2, 520)])  # by a product; pixel by pixel
def test_channels_last_input_gives_the_same_patches(size):
    x, grid = torch.randn(2, 4, *size), PatchGrid((2, 3), (2, 2), (1, 1), (1, 1, 0, 2))
    last = x.to(memory_format=torch.channels_last)
    selection = select_pixels(x, grid)
    assert bool(selection) == (size == (6, 7))
    expected = F.unfold(F.pad(x, grid.padding), (2, 3), stride=2)
    maps = gather(last, grid, selection)
    torch.testing.assert_close(maps, expected)


def test_a_map_smaller_than_the_kernel_is_named():
    with pytest.raises(ValueError, match=r"\(2, 5\) pixels.*\(3, 3\)"):
        gather(torch.randn(1, 1, 2, 5), PatchGrid((3, 3), (1, 1), (1, 1), (0, 0, 0, 0)))


SEEN = PatchGrid((3, 3), (1, 2), (1, 1), (1, 1, 1, 1))
SIZES = [(9, 12), (4, 4), (2, 1)]


@loop_over("last", [False, True])
@loop_over("size", SIZES)
@loop_over("per_image", [1, 2, 5])
def test_subset_are_those_patches_of_the_grid(size, per_image, last):
    subset = PatchSubset(SEEN, min(per_image, SEEN.count(size)), first=3)
    x = torch.randn(6, 4, *size)
    if last:
        x = x.to(memory_format=torch.channels_last)
    numbers = subset.choose(6, size, x.device)
    whole = gather(x, SEEN)  # N C*T P
    expected = torch.stack([whole[n][:, numbers[n]] for n in range(6)])
    maps = gather(x, subset)
    torch.testing.assert_close(maps, expected, rtol=0, atol=0)
    y = torch.zeros_like(x)
    other = torch.randn_like(maps)
    scatter(other, y, subset, select_pixels(x, subset))
    torch.testing.assert_close((other * maps).sum(), (y * x).sum())


PIXELS = PatchGrid((1, 1), (1, 1), (1, 1), (0,) * 4)
SAMPLINGS = [
    PIXELS,
    SEEN,
    PatchSubset(SEEN, 2, first=3),
    PatchSubset(replace(SEEN, padding=(0,) * 4), 2),
    PatchSubset(replace(PIXELS, padding=(1,) * 4), 2),
]


@loop_over("last", [False, True])
@loop_over("sampling", SAMPLINGS)
@loop_over("size", [(1, 1), (9, 12), (4, 4), (20, 7)])  # two of them by a product
def test_a_gpu_joins_the_patches_of_all_images(size, sampling, last):
    x = torch.randn(3, 4, *size)
    if size == (1, 1) and sampling is not PIXELS:
        return
    if last:
        x = x.to(memory_format=torch.channels_last)
    apart = gather(x, sampling).transpose(0, 1).flatten(1)
    with mock.patch.object(gathering, "saves_launches", lambda device: True):
        selection = select_pixels(x, sampling)
        joined = gather(x, sampling, selection)
        y, other = torch.zeros_like(x), torch.randn_like(joined)
        centred, centre = gathering.gather_centred(x, sampling, selection)
        scatter(other.clone(), y, sampling, selection)
    assert joined.shape == (1, *apart.shape)
    rows = [sorted(patches.T.tolist()) for patches in (joined[0], apart)]
    assert rows[0] == rows[1]
    torch.testing.assert_close((other * joined).sum(), (y * x).sum())
    torch.testing.assert_close(centre, joined[0].mean(1))
    torch.testing.assert_close(centred, joined - centre[:, None])


@pytest.mark.parametrize("size", SIZES)
def test_subset_of_an_image_differ_and_those_of_many_are_all(size):
    positions = SEEN.count(size)
    for per_image in range(1, positions + 1):
        numbers = PatchSubset(SEEN, per_image).choose(2 * positions, size, torch.device("cpu"))
        assert all(len(set(row)) == per_image for row in numbers.tolist())
        for column in numbers[:positions].T.tolist():
            assert sorted(column) == list(range(positions))
        later = PatchSubset(SEEN, per_image, first=5).choose(4, size, torch.device("cpu"))
        assert later.tolist() == numbers[5:9].tolist() or positions < 5


@pytest.mark.parametrize("bound, value", [("KEPT", 1), ("KEPT_BYTES", 11)])
def test_what_a_cuda_graph_reads_is_never_freed_and_all_else_is_evicted(bound, value, monkeypatch):
    capturing = [False]
    monkeypatch.setattr(constants, "_captures_graph", lambda device: capturing[0])
    monkeypatch.setattr(constants, bound, value)
    find, like = cache_constants(lambda size, device: (torch.zeros(size),)), torch.zeros(0)
    known = weakref.ref(find(1, like=like)[0])
    assert known() is find(1, like=like)[0]
    find(2, like=like)
    assert known() is None
    capturing[0] = True
    captured = weakref.ref(find(1, like=like)[0])
    find(2, like=like)
    assert captured() is not None


def test_a_capture_is_asked_for_on_devices_that_have_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert constants._captures_graph(torch.device("cuda"))
    assert not constants._captures_graph(torch.device("cpu"))
