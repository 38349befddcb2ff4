"""Validation images are held out by class and seed, and never trained on."""

import numpy as np
import pytest
import torch

from util.data.augment import Augmentation
from util.data.holdout import build_train_loader, choose_held_out
from util.data.images import DataSpec, InMemory, Split
from util.data.loader import LoaderOptions
from util.errors import DataError

TARGETS = np.array([0] * 20 + [1] * 7 + [2] * 2)
NAMES = ("a", "b", "c")
SPEC = DataSpec("set", 1, 32, NAMES, (0.0,), (1.0,))
IMAGES = torch.arange(len(TARGETS), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 32, 32)


def build(bad=None, **options):
    options = LoaderOptions(**{"batch_size": 4, "val_split": 0.25, **options})
    split = Split(InMemory(IMAGES, bad or {}), torch.from_numpy(TARGETS))
    return build_train_loader(SPEC, split, options, augmentation=Augmentation(flip=True))


def numbers(loader, epoch=1):
    """Return the numbers of the images of an epoch, each of which is the image's grey level."""
    loader.batch_sampler.set_epoch(epoch)
    return [round(255 * image.mean().item()) for images, _ in loader for image in images]


def test_no_step_trains_on_a_held_out_image():
    train = build()
    held_out = numbers(train.validation)
    assert len(held_out) == 5 + 2 + 1
    for epoch in range(1, 4):
        assert sorted([*numbers(train, epoch), *held_out]) == list(range(len(TARGETS)))
    assert sorted(round(255 * image.mean().item()) for image in train.draw_images(99)) == sorted(
        numbers(train)
    )


def test_targets_and_names_of_files_stay_with_their_images():
    train = build(bad={0: "first", 25: "last"}, on_bad_image="skip")
    for loader in (train, train.validation):
        loader.batch_sampler.set_epoch(1)
        for images, targets in loader:
            values = (255 * images[:, 0, 0, 0]).round().int()
            assert np.array_equal(TARGETS[values.numpy()], targets)
    assert train.skipped | train.validation.skipped == {"first", "last"}
    whole = build(val_split=0.0)
    for loader in (train, whole):
        loader.batch_sampler.set_epoch(1)
    assert whole.validation is None and whole.image_numbers(0) == whole.batch_sampler.images(0)
    kept = [number for batch in range(len(train)) for number in train.image_numbers(batch)]
    assert sorted(kept) == np.flatnonzero(~choose_held_out(TARGETS, 0.25, 0, NAMES)).tolist()


def test_every_class_gives_its_share_by_the_seed_and_keeps_an_image():
    masks = [choose_held_out(TARGETS, 0.25, seed, NAMES) for seed in (0, 0, 1)]
    assert np.array_equal(masks[0], masks[1]) and not np.array_equal(masks[0], masks[2])
    for fraction, expected in [(0.25, [5, 2, 1]), (0.01, [1, 1, 1]), (0.99, [19, 6, 1])]:
        held_out = choose_held_out(TARGETS, fraction, 3, NAMES)
        assert np.bincount(TARGETS[held_out]).tolist() == expected
    with pytest.raises(DataError, match="--val-split 0.1: the class c has a single training image"):
        choose_held_out(TARGETS[:-1], 0.1, 0, NAMES)


def test_all_ranks_hold_out_the_same_images():
    parts = [build(rank=rank, processes=2) for rank in range(2)]
    held_out = [number for part in parts for number in numbers(part.validation)]
    trained = [number for part in parts for number in numbers(part)]
    assert sorted([*held_out, *trained]) == list(range(len(TARGETS)))
