import os
import pickle
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.transforms import v2

from util.data.image_files import random_crop
from util.data.imagenet import MEAN, STD, build_dummy_loaders, build_imagenet_loaders
from util.data.loader import LoaderOptions
from util.errors import DataError

rng = np.random.default_rng(0)
SCENE = np.kron(rng.integers(0, 256, (5, 7, 3)), np.ones((8, 8, 1))).astype(np.uint8)  # 40 56 3
ODD = ("cmyk.jpg", "grey.jpg", "palette.png", "sixteen.png", "turned.jpg")
BAD = ("corrupt.jpg", "zero.jpg")


def write_odd_images(folder):
    """One scene in every form that ImageNet is known to hold, two of them damaged."""
    scene = Image.fromarray(SCENE)
    scene.convert("CMYK").save(folder / "cmyk.jpg", quality=100)
    scene.convert("L").save(folder / "grey.jpg", quality=100)
    scene.quantize(64).save(folder / "palette.png")
    Image.fromarray(np.asarray(scene.convert("L")).astype(np.uint16) * 257).save(
        folder / "sixteen.png"
    )
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    scene.rotate(180).save(folder / "turned.jpg", exif=exif, quality=100)
    scene.save(folder / "corrupt.jpg")
    os.truncate(folder / "corrupt.jpg", 700)
    (folder / "zero.jpg").touch()


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 5), ("val", 3)):
        for name in ("n01", "n02", "n03"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (48, 64, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.JPEG")
    return tmp_path


def build(root, test_only=False, **options):
    options = LoaderOptions(**{"batch_size": 4, **options})
    return build_imagenet_loaders(root, options, test_only=test_only)


def epoch_of(loader, epoch=0):
    loader.batch_sampler.set_epoch(epoch)
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


def normalised(image):
    pixels = v2.functional.pil_to_tensor(image) / 255
    return v2.functional.normalize(pixels, MEAN, STD)


def test_test_images_are_those_of_the_published_transforms(root):
    published = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.Lambda(normalised)])
    spec, _, test = build(root, image_size=224)
    images, targets = epoch_of(test)
    assert spec.classes == ("n01", "n02", "n03") and spec.image_size == 224
    assert targets.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    files = sorted((root / "val").rglob("*.JPEG"))
    for image, path in zip(images, files, strict=True):
        with Image.open(path) as file:
            torch.testing.assert_close(image, published(file))


def test_training_images_are_random_crops_half_of_them_mirrored(root):
    _, train, _ = build(root, seed=7)
    files = sorted((root / "train").rglob("*.JPEG"))
    mirrored = 0
    for epoch in range(4):
        images, _ = epoch_of(train, epoch)
        order = [index for batch in train.batch_sampler for _, index, _ in batch]
        for image, index in zip(images, order, strict=True):
            with Image.open(files[index]) as file:
                expected = normalised(random_crop(file, epoch, index, image_size=32, seed=7))
            flipped = torch.allclose(image, expected.flip(-1), atol=1e-5)
            assert flipped or torch.allclose(image, expected, atol=1e-5)
            mirrored += flipped
    assert 18 <= mirrored <= 42  # of 60


def test_held_out_images_are_preprocessed_as_test_images_are(root):
    train = build(root, val_split=0.2)[1]
    images, targets = epoch_of(train.validation)
    assert targets.tolist() == [0, 1, 2] and len(train.dataset) == 12
    files = sorted((root / "train").rglob("*.JPEG"))
    for image, number in zip(images, train.validation.image_numbers(0), strict=True):
        with Image.open(files[number]) as file:
            expected = normalised(v2.CenterCrop(32)(v2.Resize(37)(file)))
        torch.testing.assert_close(image, expected)


def test_batches_do_not_depend_on_workers_or_processes(root):
    one = build(root)[1:]
    for processes in (1, 2, 4):
        parts = [
            build(root, num_workers=2 * (rank == 0), rank=rank, processes=processes)[1:]
            for rank in range(processes)
        ]
        for epoch in (0, 3):
            expected = epoch_of(one[0], epoch)
            for train, _ in parts:
                train.batch_sampler.set_epoch(epoch)
            steps = zip(*(train for train, _ in parts), strict=True)
            found = map(torch.cat, zip(*chain(*steps), strict=True))
            assert all(map(torch.equal, found, expected))
        dealt = [batch for _, test in parts for batch in test]
        assert sorted(len(targets) for _, targets in dealt) == [1, 4, 4]


def test_every_kind_of_image_enters_upright_and_in_its_colours(root):
    write_odd_images(root / "val" / "n02")
    for name in BAD:
        (root / "val" / "n02" / name).unlink()
    images, _ = epoch_of(build(root)[2])
    found = dict(zip(ODD, images[6:11], strict=True))
    grey = Image.fromarray(SCENE).convert("L").convert("RGB")
    for name, image in found.items():
        scene = grey if name in ("grey.jpg", "sixteen.png") else Image.fromarray(SCENE)
        expected = normalised(v2.CenterCrop(32)(v2.Resize(37)(scene)))
        error = (image - expected).abs()
        assert error.mean() < 0.15, name  # 0.02 units is a grey level; lossy files have several
        wrong = (image - expected.flip(-1, -2)).abs()
        assert wrong.mean() > 5 * error.mean(), name


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_named_in_one_sentence(root, name):
    write_odd_images(root / "train" / "n01")
    for other in {*BAD} - {name}:
        (root / "train" / "n01" / other).unlink()
    _, train, _ = build(root)
    with pytest.raises(DataError, match=rf"^cannot decode the image [^\n]*n01/{name}[^\n]*$"):
        list(train)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_can_be_skipped_counted_and_listed(root, workers):
    write_odd_images(root / "val" / "n02")
    _, train, test = build(root, on_bad_image="skip", num_workers=workers)
    images, targets = epoch_of(test)
    assert test.skipped == {str(root / "val" / "n02" / name) for name in BAD}
    assert len(images) == len(targets) == 9 + len(ODD) and len(test.dataset) == 9 + len(ODD + BAD)
    assert len(epoch_of(train)[1]) == 15 and train.skipped == set()


def test_a_test_alone_needs_no_training_images(root):
    (root / "train").rename(root / "elsewhere")
    with pytest.raises(DataError, match="no folder .*train"):
        build(root)
    spec, train, test = build(root, test_only=True)
    assert train is None and spec.num_classes == 3 and len(epoch_of(test)[1]) == 9


def test_what_workers_need_can_be_pickled(root):
    for loader in build(root)[1:]:
        copy = pickle.loads(pickle.dumps(loader.dataset))
        keys = [(1, 2, 0), (1, 0, 0)]
        for one, two in zip(
            loader.dataset.__getitems__(keys), copy.__getitems__(keys), strict=True
        ):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))


def test_classes_that_differ_are_listed(root):
    (root / "val" / "n03").rename(root / "val" / "n04")
    with pytest.raises(DataError, match=r"train: n03; only in .*val: n04; give each class images"):
        build(root)


def test_what_cannot_be_served_is_refused_by_name(tmp_path):
    for wrong in [{"batch_size": 0}, {"image_size": 31}, {"on_bad_image": "x"}]:
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name} must be .* got {value!r}"):
            build(tmp_path, **wrong)


def test_dummy_images_are_noise_as_many_as_imagenet_has():
    spec, train, test = build_dummy_loaders(LoaderOptions(batch_size=256))
    assert (len(train.dataset), len(test.dataset)) == (1_281_167, 50_000)
    assert (len(train), len(test)) == (5005, 196) and spec.num_classes == 1000
    images, targets = next(iter(train))
    assert images.shape == (256, 3, 32, 32) and 900 > len(targets.unique()) > 150
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = images * std + mean
    assert abs(pixels.mean() - 0.5) < 0.01 and abs(pixels.std() - 12**-0.5) < 0.01
    assert torch.bincount(train.dataset.split.targets).min() > 1000


def test_a_dummy_image_depends_on_seed_and_index_alone():
    first, again, other = (
        build_dummy_loaders(LoaderOptions(batch_size=8, seed=seed), train_size=20, test_size=5)[1]
        for seed in (1, 1, 2)
    )
    (images, targets), (same, their) = epoch_of(first, 1), epoch_of(again, 1)
    assert torch.equal(images, same) and torch.equal(targets, their) and len(targets) == 20
    in_order = [
        tensor[np.argsort([i for batch in first.batch_sampler for _, i, _ in batch])]
        for tensor in (images, targets)
    ]
    images, targets = epoch_of(first, 2)
    order = [i for batch in first.batch_sampler for _, i, _ in batch]
    assert torch.equal(in_order[0][order], images) and torch.equal(in_order[1][order], targets)
    assert not torch.equal(epoch_of(other, 1)[1].sort().values, targets.sort().values)
