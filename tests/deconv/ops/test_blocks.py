"""The features of blocks, and the way back."""

import pytest
import torch

from deconv.ops.blocks import Blocks, divide_channels
from tests.pairwise import pairwise


@pytest.mark.parametrize(
    ("channels", "block", "size"), [(64, 16, 16), (3, 16, 3), (20, 16, 10), (17, 16, 1), (24, 5, 4)]
)
def test_block_is_the_largest_divisor(channels, block, size):
    assert divide_channels(channels, block) == size


def test_block_below_one_is_refused():
    with pytest.raises(ValueError, match="block.*0"):
        divide_channels(8, 0)


@pytest.mark.parametrize(
    ("unit", "axis", "shared", "groups"),  # contiguous, channels interleaved, features interleaved
    pairwise([6, 3, 1], ["joint", "channel", "pixel"], [True, False], [1, 2]),
)
def test_from_vectors_inverts_to_vectors(unit, axis, shared, groups):
    blocks = Blocks(groups=groups, channels=8, size=2, taps=3, unit=unit, shared=shared)
    x = torch.randn(5, groups * 24, 4)
    vectors = blocks.to_vectors(axis, x)
    side = {"joint": 6, "channel": 2, "pixel": 3}[axis]
    assert vectors.shape[1] == blocks.matrices * side and vectors.numel() == x.numel()
    torch.testing.assert_close(blocks.from_vectors(axis, vectors, x.shape), x, rtol=0, atol=0)


@pytest.mark.parametrize(("unit", "axis"), [(1, "joint"), (6, "joint"), (3, "channel")])
def test_blocks_that_share_are_views(unit, axis):
    blocks = Blocks(1, 8, 2, 3, unit, shared=True)
    x = torch.randn(5, 24, 4)
    assert blocks.to_vectors(axis, x).data_ptr() == x.data_ptr()


def test_blocks_hold_the_features_they_promise():
    columns = torch.arange(12).reshape(1, 12, 1)  # 4 channels of 3 taps

    def first(unit, axis="joint", shared=False):
        blocks = Blocks(1, 4, 2, 3, unit, shared)
        vectors = blocks.to_vectors(axis, columns)
        return vectors[0, : vectors.shape[1] // blocks.matrices, 0].tolist()

    assert first(6) == [0, 1, 2, 3, 4, 5]  # channels 0 and 1
    assert first(3) == [0, 1, 2, 6, 7, 8]  # channels 0 and 2
    assert first(1) == [0, 2, 4, 6, 8, 10]  # every second feature, as published
    assert first(1, shared=True) == [0, 2, 4, 6, 8, 10]
    assert first(6, "channel") == [0, 3] and first(3, "channel") == [0, 6]
    assert first(6, "pixel") == first(3, "pixel") == [0, 1, 2]
