import numpy as np
import torch
from torch.nn import functional as F

from util.augment import Augmentation, crop_padded

CROP_AND_FLIP = Augmentation(pad=4, flip=True)
generator = torch.Generator().manual_seed(0)
IMAGES = torch.randint(1, 256, (400, 3, 12, 12), dtype=torch.uint8, generator=generator)
INDEX = np.arange(400)


def augment(augmentation, images=IMAGES, index=INDEX, epoch=0, seed=0):
    return augmentation(images, seed, np.full(len(index), epoch), index)


def test_crop_equals_slicing_the_padded_picture():
    top, left = (grid.flatten() for grid in torch.meshgrid(*[torch.arange(9)] * 2, indexing="ij"))
    cropped = crop_padded(IMAGES[:81], 4, top, left)
    padded = F.pad(IMAGES[:81], [4] * 4)
    for i, (y, x) in enumerate(zip(top, left, strict=True)):
        assert torch.equal(cropped[i], padded[i, :, y : y + 12, x : x + 12])


def test_every_place_and_both_directions_occur():
    marked = torch.zeros(5000, 1, 9, 9, dtype=torch.uint8)
    marked[:, :, 4, 4] = 1  # the middle, which a crop with pad 4 can move to any pixel
    moved = augment(Augmentation(pad=4), marked, np.arange(5000))
    assert (moved.sum(0) > 20).all()
    flipped = augment(Augmentation(flip=True))
    mirrored = (flipped == IMAGES.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], IMAGES[~mirrored])
    assert 150 < mirrored.sum() < 250


def test_a_picture_is_augmented_by_seed_epoch_and_index_alone():
    whole = augment(CROP_AND_FLIP, epoch=3, seed=1)
    some = torch.tensor([7, 3, 399])
    alone = augment(CROP_AND_FLIP, IMAGES[some], INDEX[some], epoch=3, seed=1)
    assert torch.equal(alone, whole[some])
    for other in (augment(CROP_AND_FLIP, epoch=2, seed=1), augment(CROP_AND_FLIP, epoch=3)):
        assert (other != whole).flatten(1).any(1).float().mean() > 0.9


def test_no_augmentation_changes_nothing():
    assert augment(Augmentation()) is IMAGES
