import numpy as np
import pytest
import torch

from util.data import images
from util.data.images import InMemory, Pixels, channel_statistics, load_into_memory
from util.data.preprocessing import describe_preprocessing
from util.errors import BadImage, DataError

IMAGES = torch.arange(600 * 3 * 4 * 4).remainder(251).to(torch.uint8).reshape(600, 3, 4, 4)
BAD = {0: "first", 300: "middle", 599: "last"}
GOOD = [i for i in range(600) if i not in BAD]


class OnAccess:
    """IMAGES, of which some may be bad."""

    def __init__(self, bad=()):
        self.bad = dict(bad)

    def __len__(self):
        return len(IMAGES)

    def read(self, epoch, index):
        good = [i for i in index.tolist() if i not in self.bad]
        return Pixels(IMAGES[good], {i: self.bad[i] for i in index.tolist() if i in self.bad})


def read(source, *index):
    index = np.array(index, np.int64)
    return source.read(np.zeros_like(index), index)


def test_channel_statistics_are_those_of_all_good_pixels():
    for threads in [1, 3]:
        for bad in [{}, BAD]:
            mean, std = channel_statistics(OnAccess(bad), threads)
            pixels = (IMAGES[GOOD] if bad else IMAGES).numpy() / 255
            np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
            np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-12)


def test_flat_images_have_a_deviation_to_divide_by():
    mean, std = channel_statistics(InMemory(torch.full((2, 1, 4, 4), 51, dtype=torch.uint8)))
    assert mean == pytest.approx((0.2,)) and std == pytest.approx((1 / 255,))


def test_bad_images_alone_have_no_statistics():
    with pytest.raises(DataError, match="not one of 600 images can be read"):
        channel_statistics(OnAccess(dict.fromkeys(range(600), "x")))


def test_a_source_is_held_in_memory_only_within_the_budget(monkeypatch):
    assert torch.equal(load_into_memory(OnAccess()).images, IMAGES)
    monkeypatch.setattr(images, "MEMORY_BUDGET", IMAGES.numel() - 1)
    source = OnAccess()
    assert load_into_memory(source) is source


def test_a_source_held_in_memory_reads_as_before_bad_images_too():
    for threads in [1, 3]:
        source, held = OnAccess(BAD), load_into_memory(OnAccess(BAD), threads)
        for index in ([5, 2, 300, 7], [599, 0], [], range(600)):
            images, bad = read(held, *index)
            expected, expected_bad = read(source, *index)
            assert torch.equal(images, expected) and bad == expected_bad


def test_resized_images_have_the_size_asked_for():
    preprocessing = describe_preprocessing("digits", 32, in_channels=1)
    images = torch.full((5, 1, 8, 8), 9, dtype=torch.uint8)
    resized = InMemory(images, {0: "x"}, preprocessing)
    images, bad = read(resized, 4, 0, 1)
    assert torch.equal(images, torch.full((2, 1, 32, 32), 9).byte()) and bad == {0: "x"}
    assert read(resized).images.shape == (0, 1, 32, 32)


def test_an_error_out_of_a_worker_keeps_only_its_sentence():
    for kind in (DataError, BadImage):
        name = kind.__name__
        caught = f"Caught {name} in worker 0.\nTraceback ...\nutil.images.{name}: bad file x"
        assert str(kind(caught)) == "bad file x"
        assert str(kind("bad file x")) == "bad file x"
