import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from util.data import images
from util.data.datasets import build_loaders
from util.data.images import MEMORY_BUDGET
from util.data.loader import LoaderOptions
from util.errors import DataError

SIDE = 40


def image(shade):
    pixels = np.random.default_rng(shade).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return Image.fromarray(pixels)


def make_folder(root, train=("cat", "dog"), test=("cat", "dog"), second="test", count=9):
    for split, classes in (("train", train), (second, test)):
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image(100 * number + i).save(root / split / name / f"{i}.png")
    return root


def build(root, cache_dir=None, **options):
    options = LoaderOptions(batch_size=4, **options)
    return build_loaders("folder", root, options, cache_dir=cache_dir or root / "run")


def epoch_of(loader, epoch=0):
    loader.batch_sampler.set_epoch(epoch)
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


def files_below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def root(tmp_path):
    return make_folder(tmp_path / "images")


def test_two_workers_and_none_give_the_same_bits(root):
    plain, workers = (build(root, num_workers=n, seed=1)[1:] for n in (0, 2))
    for epoch in (0, 1, 3):  # the workers persist from epoch to epoch
        for one, two in zip(plain, workers, strict=True):
            images, targets = epoch_of(one, epoch)
            also_images, also_targets = epoch_of(two, epoch)
            assert torch.equal(images, also_images) and torch.equal(targets, also_targets)


def test_decoding_on_access_equals_decoding_once(root, monkeypatch):
    held = build(root)
    monkeypatch.setattr(images, "MEMORY_BUDGET", 0)
    on_access = build(root, cache_dir=root / "other run")
    assert held[0] == on_access[0]
    for one, two in zip(held[1:], on_access[1:], strict=True):
        assert torch.equal(epoch_of(one)[0], epoch_of(two)[0])


def test_epochs_differ_in_order_and_augmentation_and_the_test_split_in_nothing(root):
    _, train, test = build(root)
    (first, targets), (second, others) = epoch_of(train, 0), epoch_of(train, 1)
    assert not torch.equal(targets, others)
    assert sorted(targets.tolist()) == sorted(others.tolist()) == [0] * 9 + [1] * 9
    assert not any((first == image).flatten(1).all(1).any() for image in second)
    assert torch.equal(epoch_of(train, 0)[0], first)
    assert torch.equal(epoch_of(test, 0)[0], epoch_of(test, 5)[0])
    assert epoch_of(test)[1].tolist() == [0] * 9 + [1] * 9


def test_an_epoch_resumed_at_a_batch_gives_the_same_batches(root):
    _, train, _ = build(root)
    train.batch_sampler.set_epoch(2)
    whole = list(train)
    train.batch_sampler.set_epoch(2, start_batch=3)
    rest = list(train)
    assert len(train) == len(rest) == 2
    for (batch, targets), (also_images, also_targets) in zip(whole[3:], rest, strict=True):
        assert torch.equal(batch, also_images) and torch.equal(targets, also_targets)


def test_images_are_resized_to_image_size(root):
    spec, train, test = build(root, image_size=36)
    assert spec.image_size == 36 and spec.classes == ("cat", "dog") and spec.in_channels == 3
    for loader in (train, test):
        assert epoch_of(loader)[0].shape == (18, 3, 36, 36)


def test_statistics_are_those_of_the_training_images_as_they_enter(root):
    spec, train, _ = build(root)
    raw = train.dataset.split.source.images / 255
    torch.testing.assert_close(torch.tensor(spec.mean), raw.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(spec.std), raw.std((0, 2, 3), correction=0))


def test_statistics_are_cached_beside_the_run_and_reused(root, tmp_path):
    before = files_below(root)
    first, *_ = build(root, cache_dir=tmp_path / "run")
    assert files_below(root) == before
    (cache,) = files_below(tmp_path / "run")
    saved = json.loads(cache.read_text())
    assert (tuple(saved["mean"]), tuple(saved["std"])) == (first.mean, first.std)
    cache.write_text(json.dumps({**saved, "mean": [0.25, 0.5, 0.75]}))
    assert build(root, cache_dir=tmp_path / "run")[0].mean == (0.25, 0.5, 0.75)


def test_other_images_sizes_or_folders_do_not_reuse_the_cache(root, tmp_path):
    run = tmp_path / "run"
    build(root, cache_dir=run)
    build(root, cache_dir=run, image_size=33)
    image(7).save(root / "train" / "cat" / "new.png")
    build(root, cache_dir=run)
    os.utime(root / "train" / "cat" / "new.png", (1, 1))
    build(root, cache_dir=run)
    build(shutil.copytree(root, tmp_path / "elsewhere"), cache_dir=run)
    assert len(files_below(run)) == 5


def test_names_may_be_any_bytes(tmp_path):
    named = os.fsdecode(b"\xff\n\x1b[31m")
    root = make_folder(tmp_path / named, ("cat", named), ("cat", named), count=1)
    first, *_ = build(root)
    assert first.classes == ("cat", named)
    assert len(files_below(root / "run")) == 1 and build(root)[0] == first


def test_a_damaged_cache_is_computed_anew(root):
    first, *_ = build(root)
    (cache,) = files_below(root / "run")
    for damage in ("", "[]", '{"mean": 1}'):
        cache.write_text(damage)
        assert build(root)[0] == first
    assert json.loads(cache.read_text())["mean"] == list(first.mean)


def test_val_stands_in_for_test(tmp_path):
    _, _, test = build(make_folder(tmp_path, second="val"))
    assert len(test.dataset) == 18


def test_a_missing_split_is_named(tmp_path):
    with pytest.raises(DataError, match=r"images/train"):
        build(tmp_path / "images")
    make_folder(tmp_path / "images", second="other")
    with pytest.raises(DataError, match=r"images/test or .*images/val"):
        build(tmp_path / "images")


def test_a_split_of_fewer_than_two_classes_is_refused_by_name(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    with pytest.raises(DataError, match="/train/CLASS.*: at least two .* needed, found none"):
        build(tmp_path)
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir()
    with pytest.raises(DataError, match="/train/CLASS.*: at least two .* needed, found cat"):
        build(tmp_path)


def test_a_class_without_images_is_named(root):
    (root / "test" / "eel").mkdir()
    (root / "test" / "eel" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match="test/eel"):
        build(root)


def test_hidden_names_and_links_to_folders_are_left_out(root):
    cat = root / "train" / "cat"
    (cat / "kittens").mkdir()
    image(50).save(cat / "kittens" / "0.PNG")
    for hidden in (cat / ".ipynb_checkpoints", root / "train" / ".ipynb_checkpoints"):
        shutil.copytree(root / "test" / "cat", hidden)
    (cat / "._0.png").write_bytes(b"no image")
    (cat / "circle").symlink_to(cat)
    (cat / "others").symlink_to(root / "train")
    spec, train, _ = build(root)
    assert spec.classes == ("cat", "dog")
    assert train.dataset.split.targets.tolist() == [0] * 10 + [1] * 9


def test_thumbnails_are_neither_images_nor_classes_and_unused_files_are_counted(root, capsys):
    cat = root / "train" / "cat"
    for folder in ("@eaDir", ".thumbnails"):
        for parent in (root / "train", root / "test", cat):
            (parent / folder).mkdir()
            image(1).save(parent / folder / "0.png")
    for path in ("train/cat/a.MOV", "test/dog/b.mov", "train/dog/README", "train/0.png"):
        (root / path).touch()
    (cat / "dogs").symlink_to(root / "train" / "dog")
    spec, train, _ = build(root)
    assert spec.classes == ("cat", "dog") and len(train.dataset) == 18
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not used")]
    counts = line.removeprefix("not used: ").partition(", in ")[0].split(", ")
    assert {*counts} == {
        *("6 hidden", "2 .mov", "1 without an ending"),
        *("1 outside of the class folders", "1 links to folders"),
    }


def test_a_folder_of_images_alone_is_not_commented(root, capsys):
    build(root)
    assert capsys.readouterr().out == ""


def test_names_of_classes_are_compared_in_one_unicode_form(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    root = make_folder(tmp_path / "a", ("caf", composed, "cafz"), ("caf", decomposed, "cafz"))
    spec, train, test = build(root)
    assert spec.classes == ("caf", "cafz", composed)
    assert epoch_of(train)[1].bincount().tolist() == epoch_of(test)[1].bincount().tolist()
    assert build(make_folder(tmp_path / "b", ("caf", decomposed), ("caf", composed)))
    (root / "train" / decomposed).mkdir()
    with pytest.raises(DataError, match=f"{composed}: two folders have this name; rename one"):
        build(root)


@pytest.mark.parametrize("budget", [0, MEMORY_BUDGET])
def test_transparent_pixels_have_the_mean_colour_of_the_training_images(root, monkeypatch, budget):
    monkeypatch.setattr(images, "MEMORY_BUDGET", budget)
    for path in (*files_below(root / "train")[:6], root / "test" / "cat" / "0.png"):
        clear = np.asarray(Image.open(path).convert("RGBA")).copy()
        clear[..., 3] = 0 if "test" in path.parts else 255 * (np.arange(SIDE) < SIDE // 2)
        Image.fromarray(clear).save(path)
    for _ in range(2):  # then from the cache of the statistics
        spec, _, test = build(root)
        mean = [round(255 * value) for value in spec.mean]
        first = test.dataset.split.source.read(*np.zeros((2, 1), int)).images
        assert first.amax((0, 2, 3)).tolist() == first.amin((0, 2, 3)).tolist() == mean
    scenes = [np.asarray(Image.open(path).convert("RGBA")) for path in files_below(root / "train")]
    visible = np.concatenate([scene[scene[..., 3] > 0] for scene in scenes])
    assert np.abs(255 * np.array(spec.mean) - visible.mean(0)[:3]).max() < 1


def test_a_broken_link_is_named(root, monkeypatch):
    (root / "train" / "dog" / "gone.png").symlink_to(root / "nowhere.png")
    with pytest.raises(DataError, match=r"dog/gone\.png"):
        build(root)
    monkeypatch.setattr(images, "MEMORY_BUDGET", 0)
    with pytest.raises(DataError, match=r"^cannot read the image .*dog/gone\.png: No such file"):
        build(root)


def test_statistics_that_cannot_be_kept_are_used_all_the_same(root, capsys):
    (root / "file").write_text("")
    spec, *_ = build(root, cache_dir=root / "file" / "run")
    assert spec == build(root)[0]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the channel statistics could not be saved: ")


def test_classes_that_differ_are_listed(tmp_path):
    make_folder(tmp_path, train=("cat", "dog", "eel"), test=("cat", "fox"), count=1)
    with pytest.raises(DataError, match=r"train: dog, eel; only in .*test: fox; give each class"):
        build(tmp_path)


def test_an_image_that_cannot_be_decoded_is_named(root):
    for content in [b"", b"no image", None]:
        whole = (root / "test" / "dog" / "0.png").read_bytes()
        bad = root / "test" / "dog" / "bad.png"
        bad.write_bytes(whole[:-200] if content is None else content)
        with pytest.raises(DataError, match=r"^cannot decode the image .*dog/bad\.png"):
            build(root)


def test_a_bad_image_met_by_a_worker_is_one_sentence(root, monkeypatch):
    monkeypatch.setattr(images, "MEMORY_BUDGET", 0)
    (root / "test" / "dog" / "bad.png").write_bytes(b"no image")
    _, _, test = build(root, num_workers=1)
    with pytest.raises(DataError, match=r"^cannot decode the image [^\n]*dog/bad\.png[^\n]*$"):
        list(test)


@pytest.mark.parametrize("budget", [0, MEMORY_BUDGET])
def test_bad_images_can_be_skipped_whether_held_or_not(root, monkeypatch, budget):
    good = epoch_of(build(root)[2])
    monkeypatch.setattr(images, "MEMORY_BUDGET", budget)
    bad = {str(root / "test" / "cat" / name) for name in ("0a.png", "9.png")}
    for path in (*bad, root / "train" / "cat" / "bad.png"):
        Path(path).write_bytes(b"")
    spec, train, test = build(root, on_bad_image="skip", num_workers=2)
    batch, targets = epoch_of(test)
    assert torch.equal(batch, good[0]) and torch.equal(targets, good[1])
    assert [len(targets) for _, targets in test] == [3, 4, 3, 4, 4]  # cat, cat, cat and dog, ...
    assert test.skipped == bad and len(test.dataset) == 20
    assert len(epoch_of(train)[1]) == 18 and len(train.skipped) == 1
    assert spec == build(root, on_bad_image="skip", cache_dir=root / "other run")[0]


def test_a_folder_of_bad_images_alone_is_refused(root):
    for path in files_below(root / "train"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="not one of 18 images can be read"):
        build(root, on_bad_image="skip")


def test_images_that_exif_says_are_turned_enter_upright(root):
    path = root / "test" / "cat" / "0.png"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright = epoch_of(build(root)[2])[0]
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert torch.equal(epoch_of(build(root)[2])[0], upright)


def test_one_process_alone_writes_the_statistics(root):
    specs = [build(root, rank=rank, processes=2)[0] for rank in (1, 0, 1)]
    assert specs[0] == specs[1] == specs[2]
    before = files_below(root)
    build(root, rank=1, processes=2, cache_dir=root / "other run")
    assert files_below(root) == before
