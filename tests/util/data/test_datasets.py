import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.pairwise import loop_over
from tests.util.data.test_torchvision_sets import WRITERS
from util.data.archives import list_archives
from util.data.datasets import DATASETS, build_loaders
from util.data.embedded_sets import EmbeddedSet
from util.data.loader import LoaderOptions
from util.data.torchvision_sets import TorchvisionSet

ROOT = Path(__file__).resolve().parents[3]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def build(dataset="digits", **options):
    options = LoaderOptions(**{"batch_size": 100, **options})
    return build_loaders(dataset, "none", options, cache_dir="none")


@loop_over("name", DATASETS)
def test_a_dataset_has_all_its_places(name):
    """Each place that a new dataset needs beside its entry in DATASETS fails by name."""
    entry, tests = DATASETS[name], "tests/util/data/test_torchvision_sets.py"
    if isinstance(entry, TorchvisionSet):
        assert name in WRITERS, f"{name}: add a writer of tiny files to WRITERS in {tests}"
        try:
            archives = list_archives(entry.dataset)
        except AttributeError as error:
            pytest.fail(f"{name}: extend list_archives in util/data/archives.py: {error}")
        assert all(archive.files and archive.urls for archive in archives), f"{name}: {archives}"
        assert len(entry.mean) == len(entry.std), f"{name}: mean and std in util/data/datasets.py"
    elif isinstance(entry, EmbeddedSet):
        for part in entry.read():
            labels = set(np.asarray(part[1]).tolist())
            assert labels == set(range(len(entry.classes))), f"{name}: classes in DATASETS"
    word = re.compile(rf"(?<![\w-]){name}(?![\w-])")
    assert any(word.search(page.read_text()) for page in PAGES), f"{name}: name it in a page"


def test_augmentation_is_where_it_belongs():
    flipped = {name for name, entry in DATASETS.items() if entry.augmentation.flip}
    cropped = {name for name, entry in DATASETS.items() if entry.augmentation.pad == 4}
    images = {"cifar10", "cifar100", "stl10", "folder"}
    assert cropped == images | {"svhn"}  # house numbers, which no mirror keeps
    assert flipped == images | {"fashion", "fashion-mini"}


def test_digits_are_not_augmented_but_shuffled():
    _, train, _ = build(batch_size=2000)
    first, second = (in_epoch(train, epoch)[0] for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)


def in_epoch(loader, epoch):
    loader.batch_sampler.set_epoch(epoch)
    ((images, targets),) = loader
    return images, targets


def test_length_counts_batches_and_the_last_is_kept():
    _, train, test = build()
    assert (len(train), len(test)) == (15, 4)
    assert [len(targets) for _, targets in test] == [100, 100, 100, 60]


def test_processes_share_training_batches_and_are_dealt_test_batches():
    whole = build(batch_size=100)
    first, second = (build(batch_size=100, rank=rank, processes=2) for rank in (0, 1))
    for batch, *parts in zip(whole[1], first[1], second[1], strict=True):
        assert torch.equal(batch[0], torch.cat([images for images, _ in parts]))
    tested = [list(loaders[2]) for loaders in (whole, first, second)]
    for batch, also in zip(
        tested[0], (tested[1][0], tested[2][0], *tested[1][1:], *tested[2][1:]), strict=True
    ):
        assert torch.equal(batch[0], also[0]) and torch.equal(batch[1], also[1])


def test_a_run_of_the_loaders_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    _, train, test = build()
    for loader in (train, test):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_images_enter_with_mean_zero_and_deviation_one():
    _, train, _ = build(batch_size=2000)
    ((images, _),) = train
    assert images.mean().abs() < 1e-4 and (images.std() - 1).abs() < 1e-3


def test_what_cannot_be_served_is_refused_by_name():
    for options, message in [
        ({"dataset": "cifar11"}, "unknown dataset 'cifar11': choose from cifar10"),
        ({"image_size": 31}, "image_size must be at least 32, got 31"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"on_bad_image": "drop"}, "on_bad_image must be 'error' or 'skip', got 'drop'"),
        ({"on_bad_image": "skip"}, "on_bad_image 'skip' needs image files, and digits has none"),
        ({"rank": 2, "processes": 2}, "rank must be in 0 .. processes - 1, got 2 of 2"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            build(**options)
