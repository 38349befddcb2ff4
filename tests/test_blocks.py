"""Blocks hold the features they promise, and give them back."""

import pytest
import torch

from deconv.blocks import Blocks, divide_channels


@pytest.mark.parametrize(
    ("channels", "block", "size"), [(64, 16, 16), (3, 16, 3), (20, 16, 10), (17, 16, 1), (24, 5, 4)]
)
def test_block_is_the_largest_divisor(channels, block, size):
    assert divide_channels(channels, block) == size


def test_block_below_one_is_refused():
    with pytest.raises(ValueError, match="block.*0"):
        divide_channels(8, 0)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("unit", [6, 3, 1])  # contiguous, channels dealt, features dealt
def test_merge_inverts_split(shared, unit):
    blocks = Blocks(groups=2, channels=8, size=2, taps=3, unit=unit, shared=shared)
    x = torch.randn(2, 5, 24)
    parts = blocks.split(x)
    assert parts.shape == (blocks.matrices, blocks.sharing, 5, blocks.features)
    torch.testing.assert_close(blocks.merge(parts), x, rtol=0, atol=0)


def test_blocks_hold_the_features_they_promise():
    columns = torch.arange(12).reshape(1, 1, 12)  # 4 channels of 3 taps

    def first_block(unit):
        return Blocks(1, 4, 2, 3, unit, shared=False).split(columns)[0].flatten().tolist()

    assert first_block(6) == [0, 1, 2, 3, 4, 5]  # channels 0 and 1
    assert first_block(3) == [0, 1, 2, 6, 7, 8]  # channels 0 and 2
    assert first_block(1) == [0, 2, 4, 6, 8, 10]  # every second feature, as published
