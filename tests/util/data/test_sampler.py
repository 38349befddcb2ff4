from itertools import chain

import numpy as np
import pytest

from util.data.sampler import CROP, FLIP, ORDER, TOP, EpochBatches, _splitmix64, random_words

MANY = np.arange(20_000)


def batches(epoch=0, size=1000, batch_size=8, start_batch=0, **options):
    sampler = EpochBatches(size, batch_size, **options)
    sampler.set_epoch(epoch, start_batch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


def order(epoch, seed=0):
    return list(chain(*batches(epoch, seed=seed)))


def test_splitmix64_gives_the_published_first_outputs():
    outputs = [
        _splitmix64(np.zeros(1, np.uint64), np.full(1, step, np.uint64))[0] for step in range(3)
    ]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_words_depend_on_every_part_of_the_key_and_on_nothing_else():
    word = random_words(1, [2], [3], TOP)
    assert word == random_words(1, np.full(5, 2), np.arange(5), TOP)[3]
    for other in ((0, [2], [3], TOP), (1, [1], [3], TOP), (1, [2], [4], TOP), (1, [2], [3], FLIP)):
        assert word != random_words(*other)
    assert random_words(-1, [0], [0], TOP) != random_words(0, [0], [0], TOP)


def test_words_are_uniform_and_draws_uncorrelated():
    for below in [2, 9]:
        top, flip = (random_words(0, [0], MANY, draw) % np.uint64(below) for draw in (TOP, FLIP))
        share = np.bincount(top.astype(int), minlength=below) / len(MANY)
        assert np.abs(share - 1 / below).max() < 5 * np.sqrt(1 / below / len(MANY))
        assert abs(np.corrcoef(top, flip)[0, 1]) < 5 / np.sqrt(len(MANY))


def test_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    first = order(3)
    assert {epoch for epoch, *_ in first} == {3}
    assert sorted(index for _, index, _ in first) == list(range(1000))
    assert first == order(3)
    indices = [[i for _, i, _ in keys] for keys in (first, order(4), order(3, seed=1))]
    assert indices[0] != indices[1] != indices[2] != indices[0]


def test_every_epoch_shuffles_afresh():
    words = [random_words(0, [epoch], MANY, ORDER) for epoch in range(2)]
    ranks = [np.argsort(np.argsort(word)) for word in words]
    assert abs(np.corrcoef(*ranks)[0, 1]) < 5 / np.sqrt(len(MANY))


def test_many_draws_of_an_image_are_those_drawn_one_by_one():
    many = random_words(-1, 2, 3, CROP + np.arange(4))
    assert many.tolist() == [random_words(-1, [2], [3], CROP + i)[0] for i in range(4)]


def test_batches_are_the_order_cut_and_the_last_is_kept():
    found = batches(2, size=20, seed=5)
    assert [len(batch) for batch in found] == [8, 8, 4]
    words = random_words(5, [2], np.arange(20), ORDER).tolist()
    assert [i for batch in found for _, i, _ in batch] == sorted(range(20), key=words.__getitem__)


def test_an_epoch_resumed_at_a_batch_continues_the_same_order():
    for train in [True, False]:
        for rank in range(3):
            share = {"size": 45, "seed": 5, "rank": rank, "processes": 3, "train": train}
            entire = batches(1, **share)
            for start in range(7):
                done = start if train else len(range(rank, start, 3))
                assert batches(1, start_batch=start, **share) == entire[done:]


def test_every_epoch_of_test_batches_has_the_order_of_the_data():
    found = batches(7, size=5, batch_size=2, train=False)
    assert [[index for _, index, _ in batch] for batch in found] == [[0, 1], [2, 3], [4]]


def test_the_parts_of_all_processes_are_the_batches_of_one():
    for size, batch_size in [(23, 8), (24, 8), (17, 8), (3, 8), (9, 2)]:
        options = {"epoch": 1, "size": size, "batch_size": batch_size, "seed": 3}
        for processes in range(1, 6):
            parts = [
                batches(rank=rank, processes=processes, **options) for rank in range(processes)
            ]
            together = list(zip(*parts, strict=True))  # strict: all take the same number of steps
            assert [[*chain(*step)] for step in together] == batches(**options)
            for step in together:
                sizes = [len(part) for part in step]
                assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


def test_the_images_of_a_batch_can_be_told_afterwards():
    sampler = EpochBatches(20, 8, seed=5, rank=1, processes=2)
    sampler.set_epoch(2, start_batch=2)
    found = batches(2, size=20, seed=5)
    assert [sampler.images(i) for i in range(3)] == [[i for _, i, _ in batch] for batch in found]


def test_whole_batches_are_dealt_in_turn():
    for size, batch_size in [(23, 8), (24, 8), (3, 8), (9, 2)]:
        options = {"size": size, "batch_size": batch_size, "train": False}
        one = batches(**options)
        for processes in range(1, 6):
            for rank in range(processes):
                dealt = batches(rank=rank, processes=processes, **options)
                assert dealt == one[rank::processes]


def test_a_rank_that_no_process_has_is_refused():
    for rank, processes in [(-1, 2), (2, 2), (0, 0)]:
        with pytest.raises(ValueError, match=f"got {rank} of {processes}"):
            EpochBatches(5, 2, rank=rank, processes=processes)
