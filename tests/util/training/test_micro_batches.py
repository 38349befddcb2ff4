from contextlib import nullcontext
from itertools import product

import numpy as np
import pytest
from torch import nn

from tests.pairwise import loop_over
from util.errors import RunError
from util.training.micro_batches import check_batch_size, split_batch


@loop_over("total limit ranks", product((1, 7, 24), (1, 5, 6, None), (1, 2, 3)))
def test_any_number_of_ranks_makes_the_same_micro_batches(total, limit, ranks):
    shares = np.array_split(np.arange(total), ranks)
    split = [split_batch(int(share[0]), total, limit) for share in shares if len(share)]
    count = len(split[0])
    for number, parts in enumerate(zip(*split, strict=True)):
        expected = np.arange(number, total, count)
        own = [share[part.own] for share, part in zip(shares, parts, strict=False)]
        assert np.array_equal(np.concatenate(own), expected)
        for share, part in zip(shares, parts, strict=False):
            assert (part.offset, part.total) == ((expected < share[0]).sum(), len(expected))
        assert total // count <= len(expected) <= (limit or total)


@pytest.mark.parametrize(
    ("images", "batch_size", "ranks", "accum_steps", "fits"),
    [
        (9, 4, 1, 1, False),
        (9, 1, 1, 1, False),
        (9, 3, 1, 1, True),
        (1, 4, 1, 1, False),
        *((8 + last, 8, 2, 1, last == 4) for last in (1, 2, 3, 4)),
        *((8 + last, 8, 1, 4, last in (2, 4)) for last in (1, 2, 3, 4, 5)),
        (12, 8, 2, 2, True),
        (16, 8, 2, 4, False),
    ],
)
def test_a_single_image_never_meets_batchnorm1d(images, batch_size, ranks, accum_steps, fits):
    parts = ", split over 2 processes" if ranks == 2 else "has "
    refused = nullcontext() if fits else pytest.raises(RunError, match=f"--batch-size .*{parts}")
    with refused:
        check_batch_size(nn.Sequential(nn.BatchNorm1d(3)), images, batch_size, ranks, accum_steps)


def test_a_single_image_is_no_last_batch_for_batchnorm2d():
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(RunError, match=r"batch of 9 images has 1; .* too few for BatchNorm2d"):
        check_batch_size(model, 9, 4)
    check_batch_size(model, 9, 4, allow_rest=True)
    for images, batch_size, ranks in [(9, 1, 1), (10, 4, 2), (8, 4, 1)]:
        check_batch_size(model, images, batch_size, ranks)


def test_a_micro_batch_has_an_image_for_every_rank():
    with pytest.raises(RunError, match="--batch-size 1: fewer images than the 2 processes"):
        check_batch_size(nn.Linear(1, 1), 8, 1, world_size=2)
    with pytest.raises(RunError, match="5: fewer images than the 2 processes x --accum-steps 3"):
        check_batch_size(nn.Linear(1, 1), 8, 5, world_size=2, accum_steps=3)
