"""The folded weight on raw rows against the raw weight on whitened rows."""

import pytest
import torch
from torch.nn import functional as F

from deconv.ops.blocks import Blocks, transform_along
from deconv.ops.fold import fold

BLOCKS = {
    "contiguous": Blocks(groups=2, channels=4, size=2, taps=3, unit=6, shared=False),
    "contiguous, shared": Blocks(groups=2, channels=4, size=2, taps=3, unit=6, shared=True),
    "channels dealt": Blocks(groups=2, channels=4, size=2, taps=3, unit=3, shared=True),
    "features dealt": Blocks(groups=2, channels=4, size=2, taps=3, unit=1, shared=True),
}
SINGLE_AXES = [("channel",), ("pixel",), ("channel", "pixel")]
CASES = [(name, ("joint",)) for name in BLOCKS]
CASES += [(name, axes) for name in BLOCKS if name != "features dealt" for axes in SINGLE_AXES]


def square(count, side):
    return torch.randn(count, side, side, dtype=torch.float64)


@pytest.mark.parametrize(("name", "axes"), CASES)
def test_folding_moves_the_whitening_from_the_rows_to_the_weight(name, axes):
    blocks = BLOCKS[name]
    side = {"joint": 6, "channel": 2, "pixel": 3}
    whiten = {axis: square(blocks.matrices, side[axis]) for axis in axes}
    mean = torch.randn(24, dtype=torch.float64)
    weight = torch.randn(10, 4, 3, dtype=torch.float64)  # 5 outputs a group
    bias = torch.randn(10, dtype=torch.float64)
    maps = torch.randn(7, 24, 3, dtype=torch.float64)  # 7 images of 3 patches

    white = maps - mean[:, None]
    for axis, matrix in reversed(whiten.items()):
        white = transform_along(axis, white, matrix, blocks)
    expected = F.conv1d(white, weight.reshape(10, 12, 1), bias, groups=2)

    folded, shift = fold(weight, bias, mean, whiten, blocks)
    actual = F.conv1d(maps, folded.reshape(10, 12, 1), shift, groups=2)
    torch.testing.assert_close(actual, expected)


def test_no_bias_counts_as_zero_and_one_mean_a_channel_serves_all_taps():
    blocks = BLOCKS["channels dealt"]
    mean = torch.randn(8)
    weight, whiten = torch.randn(10, 4, 3), {"channel": square(2, 2).float()}
    every_tap = mean.repeat_interleave(3)
    without = fold(weight, None, mean, whiten, blocks)
    with_zero = fold(weight, torch.zeros(10), every_tap, whiten, blocks)
    torch.testing.assert_close(without, with_zero)


@pytest.mark.parametrize(("axis", "side"), [("joint", 6), ("channel", 2), ("pixel", 3)])
def test_whitening_multiplies_the_vectors_along_the_axis(axis, side):
    maps, matrix = torch.randn(5, 12, 4), square(2, side).float()
    blocks = Blocks(groups=2, channels=2, size=2, taps=3, unit=6, shared=True)
    white = blocks.to_vectors(axis, transform_along(axis, maps, matrix, blocks)).unflatten(
        1, (2, side)
    )
    vectors = blocks.to_vectors(axis, maps).unflatten(1, (2, side))
    torch.testing.assert_close(white, torch.einsum("gij,rgjl->rgil", matrix, vectors))
