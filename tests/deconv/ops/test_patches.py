"""Sampled patches against loops and torch's own im2col."""

import pytest
import torch
from torch.nn import functional as F

from deconv.ops.patches import PatchGrid, PatchSubset, gather, scatter, select_pixels

SHAPES = [
    # kernel, stride, dilation, size
    ((3, 3), (1, 1), (1, 1), (7, 8)),
    ((3, 3), (3, 3), (1, 1), (9, 10)),
    ((2, 5), (2, 1), (1, 2), (8, 13)),
    ((1, 1), (4, 4), (1, 1), (5, 5)),
    ((4, 2), (6, 9), (2, 1), (11, 9)),
    ((3, 4), (2, 3), (2, 1), (12, 13)),  # line by line
    ((2, 3), (1, 7), (1, 3), (2, 530)),  # lines too long for a product
    ((3, 3), (2, 2), (1, 1), (2, 1)),  # smaller than the kernel but for its padding
]


def side_by_side(maps, count):
    """All positions of each of `count` images along the last dimension."""
    return maps.unflatten(0, (count, -1)).transpose(1, 2).flatten(2)


PADDINGS = [(1, 2, 3, 1), (4, 4, 4, 4)]


@pytest.mark.parametrize("by_product", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("kernel", "stride", "dilation", "size"), SHAPES)
def test_patches_equal_im2col(kernel, stride, dilation, size, padding, by_product):
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    window = PatchGrid(kernel, stride, dilation, padding)
    selection = select_pixels(x, window) if by_product else ()
    expected = F.unfold(F.pad(x, padding), kernel, dilation=dilation, stride=stride)  # N C*T L
    maps = side_by_side(gather(x, window, selection), 2)
    torch.testing.assert_close(maps, expected, rtol=0, atol=0)
    assert window.count(size) == expected.shape[2]


@pytest.mark.parametrize("by_product", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("kernel", "stride", "dilation", "size"), SHAPES)
def test_scatter_is_the_adjoint_of_gather(kernel, stride, dilation, size, padding, by_product):
    x, y = torch.randn(2, 2, 6, *size, dtype=torch.float64)
    window = PatchGrid(kernel, stride, dilation, padding)
    maps = torch.randn_like(gather(x, window))
    before = y.clone()
    scatter(maps, y, window, select_pixels(x, window) if by_product else ())
    torch.testing.assert_close((maps * gather(x, window)).sum(), ((y - before) * x).sum())


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
    window = PatchGrid((3,) * dims, (3,) * dims, (1,) * dims, (0, 0) * dims)
    for selection in ((), select_pixels(x, window)):
        maps = gather(x, window, selection)
        assert maps.shape[1] == 4 * 3**dims and maps.numel() == x.numel()
        torch.testing.assert_close(
            maps[0, :, 0].reshape(4, *(3,) * dims), x[(0, ..., *[slice(3)] * dims)]
        )


# whole maps by a product; lines by a product; pixel by pixel
@pytest.mark.parametrize("size", [(6, 7), (20, 7), (2, 520)])
def test_channels_last_input_gives_the_same_patches(size):
    x, window = torch.randn(2, 4, *size), PatchGrid((2, 3), (2, 2), (1, 1), (1, 1, 0, 2))
    last = x.to(memory_format=torch.channels_last)
    selection = select_pixels(x, window)
    assert (not selection) == (size[1] == 520)
    expected = F.unfold(F.pad(x, window.padding), (2, 3), stride=2)
    maps = gather(last, window, selection)
    torch.testing.assert_close(side_by_side(maps, 2), expected)


def test_a_map_smaller_than_the_kernel_is_named():
    with pytest.raises(ValueError, match=r"\(2, 5\) pixels.*\(3, 3\)"):
        gather(torch.randn(1, 1, 2, 5), PatchGrid((3, 3), (1, 1), (1, 1), (0, 0, 0, 0)))


SEEN = PatchGrid((3, 3), (1, 2), (1, 1), (1, 1, 1, 1))
SIZES = [(9, 12), (4, 4), (2, 1)]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("per_image", [1, 2, 5])
def test_spots_are_those_patches_of_the_window(size, per_image, last):
    spots = PatchSubset(SEEN, min(per_image, SEEN.count(size)), first=3)
    x = torch.randn(6, 4, *size)
    if last:
        x = x.to(memory_format=torch.channels_last)
    numbers = spots.choose(6, size, x.device)
    whole = gather(x, SEEN)  # N C*T P, or line by line
    whole = side_by_side(whole, 6)
    expected = torch.stack([whole[n][:, numbers[n]] for n in range(6)])
    for selection in ((), select_pixels(x, spots)):
        maps = gather(x, spots, selection)
        torch.testing.assert_close(maps, expected, rtol=0, atol=0)
        y = torch.zeros_like(x)
        other = torch.randn_like(maps)
        scatter(other, y, spots, selection)
        torch.testing.assert_close((other * maps).sum(), (y * x).sum())


@pytest.mark.parametrize("size", SIZES)
def test_spots_of_a_image_differ_and_those_of_many_are_all(size):
    positions = SEEN.count(size)
    for per_image in range(1, positions + 1):
        numbers = PatchSubset(SEEN, per_image).choose(2 * positions, size, torch.device("cpu"))
        assert all(len(set(row)) == per_image for row in numbers.tolist())
        for column in numbers[:positions].T.tolist():
            assert sorted(column) == list(range(positions))
        later = PatchSubset(SEEN, per_image, first=5).choose(4, size, torch.device("cpu"))
        assert later.tolist() == numbers[5:9].tolist() or positions < 5
