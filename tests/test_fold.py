"""The folded weight on raw rows against the raw weight on whitened rows."""

import pytest
import torch

from deconv.blocks import Blocks
from deconv.fold import fold, grid_along, whiten_along

BLOCKS = {
    "contiguous": Blocks(groups=2, channels=4, size=2, taps=3, unit=6, shared=False),
    "contiguous, shared": Blocks(groups=2, channels=4, size=2, taps=3, unit=6, shared=True),
    "channels dealt": Blocks(groups=2, channels=4, size=2, taps=3, unit=3, shared=True),
    "features dealt": Blocks(groups=2, channels=4, size=2, taps=3, unit=1, shared=True),
}
SINGLE_AXES = [("channel",), ("pixel",), ("channel", "pixel")]
CASES = [(name, ("joint",)) for name in BLOCKS]
CASES += [(name, axes) for name in BLOCKS if name != "features dealt" for axes in SINGLE_AXES]


def symmetric(count, side):
    noise = torch.randn(count, side, side, dtype=torch.float64)
    return noise + noise.mT


@pytest.mark.parametrize(("name", "axes"), CASES)
def test_folding_moves_the_whitening_from_the_rows_to_the_weight(name, axes):
    blocks = BLOCKS[name]
    side = {"joint": 6, "channel": 2, "pixel": 3}
    whiten = {axis: symmetric(blocks.matrices, side[axis]) for axis in axes}
    mean = torch.randn(blocks.matrices, blocks.sharing, 1, 6, dtype=torch.float64)
    weight = torch.randn(10, 4, 3, dtype=torch.float64)  # 5 outputs a group
    bias = torch.randn(10, dtype=torch.float64)
    rows = torch.randn(2, 7, 12, dtype=torch.float64)  # groups M C*T

    white = blocks.split(rows) - mean
    for axis, matrix in whiten.items():
        white = whiten_along(axis, white, matrix, blocks.size)
    raw_weight = weight.reshape(2, 5, 12)
    expected = blocks.merge(white) @ raw_weight.mT + bias.reshape(2, 1, 5)

    folded, shift = fold(weight, bias, mean, whiten, blocks)
    actual = rows @ folded.reshape(2, 5, 12).mT + shift.reshape(2, 1, 5)
    torch.testing.assert_close(actual, expected)


def test_no_bias_counts_as_zero_and_one_mean_a_channel_serves_all_taps():
    blocks = BLOCKS["channels dealt"]
    mean = torch.randn(2, 2, 1, 2)  # G S 1 B
    weight, whiten = torch.randn(10, 4, 3), {"channel": symmetric(2, 2).float()}
    every_tap = mean.repeat_interleave(3, dim=-1)
    without = fold(weight, None, mean, whiten, blocks)
    with_zero = fold(weight, torch.zeros(10), every_tap, whiten, blocks)
    torch.testing.assert_close(without, with_zero)


@pytest.mark.parametrize(("axis", "side"), [("joint", 6), ("channel", 2), ("pixel", 3)])
def test_whitening_multiplies_the_vectors_along_the_axis(axis, side):
    rows, matrix = torch.randn(2, 1, 5, 6), symmetric(2, side).float()
    white = grid_along(axis, whiten_along(axis, rows, matrix, 2), 2).flatten(1, -2)
    torch.testing.assert_close(white, grid_along(axis, rows, 2).flatten(1, -2) @ matrix)
