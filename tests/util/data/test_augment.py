import numpy as np
import torch
from scipy.stats import ks_2samp
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop

from util.data.augment import Augmentation, crop_padded, random_box

CROP_AND_FLIP = Augmentation(pad=4, flip=True)
generator = torch.Generator().manual_seed(0)
IMAGES = torch.randint(1, 256, (400, 3, 12, 12), dtype=torch.uint8, generator=generator)
INDEX = np.arange(400)


def augment(augmentation, images=IMAGES, index=INDEX, epoch=0, seed=0):
    return augmentation(images, seed, np.full(len(index), epoch), index)


def test_crop_equals_slicing_the_padded_image():
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


def test_an_image_is_augmented_by_seed_epoch_and_index_alone():
    whole = augment(CROP_AND_FLIP, epoch=3, seed=1)
    some = torch.tensor([7, 3, 399])
    alone = augment(CROP_AND_FLIP, IMAGES[some], INDEX[some], epoch=3, seed=1)
    assert torch.equal(alone, whole[some])
    for other in (augment(CROP_AND_FLIP, epoch=2, seed=1), augment(CROP_AND_FLIP, epoch=3)):
        assert (other != whole).flatten(1).any(1).float().mean() > 0.9


def test_no_augmentation_changes_nothing():
    assert augment(Augmentation()) is IMAGES


def test_random_boxes_are_distributed_as_torchvision_draws_them():
    for width, height in [(500, 375), (200, 400)]:
        torch.manual_seed(0)
        published = RandomResizedCrop(224)
        image, scale, ratio = torch.empty(3, height, width), published.scale, published.ratio
        theirs = np.array([published.get_params(image, scale, ratio) for _ in range(2000)])
        ours = np.array([random_box(width, height, 0, 1, index) for index in range(2000)])
        for boxes in (theirs, ours):
            assert (
                (boxes >= 0) & (boxes[:, :2] + boxes[:, 2:] <= [height, width]).all(1)[:, None]
            ).all()
        for one, two in zip(columns(theirs), columns(ours), strict=True):
            assert ks_2samp(one, two).pvalue > 0.001


def columns(boxes):
    """Top, left, height and width of boxes (N, 4), and their area and aspect."""
    *place, high, wide = boxes.T
    return [*place, high, wide, high * wide, wide / high]


def test_an_image_too_narrow_for_a_random_box_gives_its_middle():
    for width, height in [(999, 10), (7, 300), (1, 1)]:
        published = RandomResizedCrop(224)
        image = torch.empty(3, height, width)
        expected = published.get_params(image, published.scale, published.ratio)
        assert random_box(width, height, 0, 0, 0) == tuple(expected)


def test_a_random_box_depends_on_every_part_of_its_key():
    box = random_box(500, 375, 1, 2, 3)
    assert box == random_box(500, 375, 1, 2, 3)
    for key in ((0, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert box != random_box(500, 375, *key)


def test_no_images_are_augmented_to_none():
    none = augment(CROP_AND_FLIP, IMAGES[:0], INDEX[:0])
    assert none.shape == (0, *IMAGES.shape[1:]) and none.dtype == torch.uint8
