import numpy as np
import pytest

from util.sampling import FLIP, ORDER, TOP, EpochSampler, _splitmix64, random_words

MANY = np.arange(20_000)


def order(epoch, seed=0, size=1000, start_batch=0):
    sampler = EpochSampler(size, batch_size=8, seed=seed)
    sampler.set_epoch(epoch, start_batch)
    return list(sampler)


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


@pytest.mark.parametrize("below", [2, 9])
def test_words_are_uniform_and_draws_uncorrelated(below):
    top, flip = (random_words(0, [0], MANY, draw) % np.uint64(below) for draw in (TOP, FLIP))
    share = np.bincount(top.astype(int), minlength=below) / len(MANY)
    assert np.abs(share - 1 / below).max() < 5 * np.sqrt(1 / below / len(MANY))
    assert abs(np.corrcoef(top, flip)[0, 1]) < 5 / np.sqrt(len(MANY))


def test_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    first = order(3)
    assert {epoch for epoch, _ in first} == {3}
    assert sorted(index for _, index in first) == list(range(1000))
    assert first == order(3)
    indices = [[i for _, i in keys] for keys in (first, order(4), order(3, seed=1))]
    assert indices[0] != indices[1] != indices[2] != indices[0]


def test_every_epoch_shuffles_afresh():
    words = [random_words(0, [epoch], MANY, ORDER) for epoch in range(2)]
    ranks = [np.argsort(np.argsort(word)) for word in words]
    assert abs(np.corrcoef(*ranks)[0, 1]) < 5 / np.sqrt(len(MANY))


def test_an_epoch_resumed_at_a_batch_continues_the_same_order():
    sampler = EpochSampler(20, batch_size=8, seed=5)
    whole = list(sampler)
    sampler.set_epoch(0, start_batch=2)
    assert list(sampler) == whole[16:]
    assert len(sampler) == 4
    sampler.set_epoch(1)
    assert len(sampler) == len(list(sampler)) == 20


def test_without_shuffle_every_epoch_has_the_order_of_the_data():
    sampler = EpochSampler(5, batch_size=2, shuffle=False)
    sampler.set_epoch(7)
    assert [index for _, index in sampler] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1)])
def test_negative_places_are_refused(epoch, start):
    with pytest.raises(ValueError, match="-1"):
        EpochSampler(5, batch_size=2).set_epoch(epoch, start)
