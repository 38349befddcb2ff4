import numpy as np
import pytest
import torch

from util import pictures
from util.augment import Augmentation
from util.pictures import (
    DataError,
    DataSpec,
    PictureSet,
    Resized,
    Split,
    channel_statistics,
    hold_in_memory,
)

IMAGES = torch.arange(600 * 3 * 4 * 4).remainder(251).to(torch.uint8).reshape(600, 3, 4, 4)
TARGETS = torch.arange(600) % 7


class OnAccess:
    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, indices):
        return IMAGES[indices]


@pytest.mark.parametrize("threads", [1, 3])
def test_channel_statistics_are_those_of_all_pixels(threads):
    mean, std = channel_statistics(OnAccess(), threads)
    pixels = IMAGES.numpy() / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-12)


def test_flat_pictures_have_a_deviation_to_divide_by():
    mean, std = channel_statistics(torch.full((2, 1, 4, 4), 51, dtype=torch.uint8))
    assert mean == pytest.approx((0.2,)) and std == pytest.approx((1 / 255,))


def test_a_source_is_held_in_memory_only_within_the_budget(monkeypatch):
    assert torch.equal(hold_in_memory(OnAccess()), IMAGES)
    monkeypatch.setattr(pictures, "MEMORY_BUDGET", IMAGES.numel() - 1)
    source = OnAccess()
    assert hold_in_memory(source) is source


def test_resized_pictures_have_the_size_asked_for():
    resized = Resized(torch.full((5, 1, 8, 8), 9, dtype=torch.uint8), 32)
    assert torch.equal(resized[torch.tensor([4, 0])], torch.full((2, 1, 32, 32), 9).byte())


def test_batches_are_normalised_pictures_with_their_targets():
    spec = DataSpec("set", 3, 4, ("a", "b"), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    images, targets = PictureSet(spec, Split(OnAccess(), TARGETS)).__getitems__([(0, 5), (0, 2)])
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    torch.testing.assert_close(images, (IMAGES[[5, 2]] / 255 - mean) / std)
    assert targets.tolist() == [5, 2] and targets.dtype == torch.int64
    assert spec.num_classes == 2


def test_a_picture_alone_is_the_picture_in_its_batch():
    spec = DataSpec("set", 3, 4, ("a",), (0.0,) * 3, (1.0,) * 3)
    augmentation = Augmentation(pad=2, flip=True)
    data = PictureSet(spec, Split(IMAGES, TARGETS), seed=3, augmentation=augmentation)
    keys = [(1, 4), (2, 4), (2, 9)]
    images, targets = data.__getitems__(keys)
    assert len(data) == 600
    for i, key in enumerate(keys):
        image, target = data[key]
        assert torch.equal(image, images[i]) and target == targets[i]


def test_an_error_out_of_a_worker_keeps_only_its_sentence():
    caught = "Caught DataError in worker 0.\nTraceback ...\nutil.pictures.DataError: bad file x"
    assert str(DataError(caught)) == "bad file x"
    assert str(DataError("bad file x")) == "bad file x"
