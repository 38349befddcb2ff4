"""Tests of test images for a trained network."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.pairwise import loop_over
from util.data.images import DataSpec
from util.data.known_classes import build_test_loader
from util.data.loader import LoaderOptions
from util.errors import DataError

SPEC = DataSpec("imagenet", 3, 32, ("cat", "cow", "dog"), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
OPTIONS = LoaderOptions(batch_size=8)


def write(root, *names):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (50 * number, 0, 0)).save(root / name / f"{number}.png")


def read(root, spec=SPEC):
    (batch,) = build_test_loader(spec, root, OPTIONS)
    return batch


@loop_over(
    ("dataset", "names", "reds"),
    [
        ("imagenet", ["cat", "dog"], [0, 50]),  # the class folders themselves
        ("imagenet", ["val/cat", "val/dog"], [0, 50]),
        ("imagenet", ["test/cat", "train/zebra", "test/dog"], [0, 100]),
        ("imagenet", ["test/cow", "val/cat", "val/dog"], [50, 100]),
        ("folder", ["val/cow", "test/cat", "test/dog"], [50, 100]),
    ],
)
def test_only_the_test_images_are_read(dataset, names, reds, tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write(root, *names)
    images, targets = read(root, replace(SPEC, name=dataset))
    assert targets.tolist() == [0, 2]  # as in the training, although cow is missing
    found = (images[:, :, 0, 0] * torch.tensor(SPEC.std) + torch.tensor(SPEC.mean)) * 255
    torch.testing.assert_close(found[:, 0], torch.tensor(reds).float(), atol=1e-3, rtol=0)


def test_missing_classes_are_said_in_one_line(tmp_path, capsys):
    write(tmp_path, "val/cat")
    (tmp_path / "val" / "dog").mkdir()
    read(tmp_path)
    expected = f"{tmp_path / 'val'}: no images of 2 of 3 classes: cow, dog\n"
    assert capsys.readouterr().out == expected


@loop_over(
    ("names", "message"),
    [
        (["val/cat", "val/zebra"], "not know the classes of {root}/val/zebra: it knows cat, cow, "),
        (["cat", "zebra"], "not know the classes of {root}/zebra"),
        (["train/cat"], "not know the classes of {root}/train"),
        (["val/.cat"], "no images in {root}/val/CLASS/*: CLASS is one of cat, cow, dog"),
        (["../elsewhere/cat"], "no images in {root}/CLASS/*"),
    ],
)
def test_unusable_folders_are_refused_by_name(names, message, tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write(root, *names)
    with pytest.raises(DataError) as error:
        read(root)
    assert message.format(root=root) in str(error.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=f"no folder {tmp_path / 'gone'}"):
        read(tmp_path / "gone")


def test_foreign_classes_are_named_up_to_ten(tmp_path):
    write(tmp_path, *(f"val/{number:02}" for number in range(12)))
    with pytest.raises(DataError, match="val/09 and 2 more: it knows"):
        read(tmp_path)
