"""Decoded images are read from the cache if nothing has changed, and from nowhere else."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from util.data import image_files
from util.data.datasets import build_loaders
from util.data.loader import LoaderOptions
from util.errors import BadImage


@pytest.fixture
def root(tmp_path):
    shades = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = shades.integers(0, 256, (40, 40, 3), np.uint8)
                path = tmp_path / "images" / split / name / f"{number}.png"
                Image.fromarray(pixels).save(path)
    return tmp_path / "images"


class Reader:
    """Reads the folder with a cache, and counts the files that are decoded."""

    def __init__(self, root, monkeypatch):
        self.root, self.cache, self.decoded = root, root.parent / "cache", []
        open_image = image_files.open_image

        def count(path, *rest):
            self.decoded.append(path)
            return open_image(path, *rest)

        monkeypatch.setattr(image_files, "open_image", count)

    def __call__(self, cached=True, **options):
        """Return the description, the images of both splits, and the number of decoded files."""
        self.decoded.clear()
        options = LoaderOptions(**{"batch_size": 4, **options})
        run = self.root.parent / "run"
        places = {"cache_dir": run, "image_cache": self.cache if cached else None}
        spec, *loaders = build_loaders("folder", self.root, options, **places)
        shutil.rmtree(run, ignore_errors=True)  # the statistics
        held = [loader.dataset.split.source for loader in loaders]
        return spec, held, len({*self.decoded})

    def files(self):
        return sorted(self.cache.iterdir())


@pytest.fixture
def read(root, monkeypatch):
    return Reader(root, monkeypatch)


def same(one, other):
    pairs = zip(one[1], other[1], strict=True)
    return one[0] == other[0] and all(
        torch.equal(a.images, b.images) and a.bad == b.bad for a, b in pairs
    )


def test_the_second_start_decodes_nothing_and_gives_the_same_bits(read):
    plain = read(cached=False)
    assert not read.cache.exists()
    first, second = read(), read()
    assert (first[2], second[2]) == (12, 0)
    assert same(first, plain) and same(second, plain)
    assert [file.name.split("-")[0] for file in read.files()] == ["test", "train"]


def test_other_images_or_settings_are_decoded_and_replace_those_of_the_folder(read):
    read()
    path = read.root / "train" / "cat" / "0.png"
    changes = [
        lambda: os.utime(path, (1, 1)),
        lambda: path.write_bytes((read.root / "test" / "cat" / "0.png").read_bytes()),
        lambda: path.rename(path.with_name("9.png")),
        lambda: shutil.copy(path.with_name("1.png"), path),
    ]
    for change in changes:
        change()
        assert read()[2] in (6, 7) and read()[2] == 0
        assert same(read(), read(cached=False)) and len(read.files()) == 2
    assert read(max_image_pixels=1600)[2] == 13
    assert read(image_size=36)[2] == 13 and len(read.files()) == 4


def test_a_damaged_file_is_decoded_anew(read):
    plain = read()
    path = next(file for file in read.files() if file.name.startswith("train"))
    whole = path.read_bytes()
    with np.load(path) as arrays:
        arrays = dict(arrays)
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damage in (b"", whole[:middle], flipped, b"no archive"):
        path.write_bytes(damage)
        found = read()
        assert found[2] == 6 and same(found, plain) and read()[2] == 0
    np.savez(path, **{**arrays, "images": np.array([print], object)})  # would be unpickled
    assert read()[2] == 6 and read()[2] == 0


def test_bad_images_stay_bad(read):
    bad = read.root / "train" / "dog" / "1.png"
    bad.write_bytes(b"")
    first, second = read(on_bad_image="skip"), read(on_bad_image="skip")
    assert (second[2], second[1][0].bad) == (0, {4: str(bad)}) and same(first, second)
    with pytest.raises(BadImage, match=r"dog/1\.png"):
        read()


def test_transparent_images_keep_their_background(read):
    for name in ("0.png", "1.png"):
        path = read.root / "train" / "dog" / name
        clear = np.asarray(Image.open(path).convert("RGBA")).copy()
        clear[:20, :, 3] = 0
        Image.fromarray(clear).save(path)
    assert same(read(), read(cached=False)) and same(read(), read(cached=False))


def test_one_process_alone_writes_and_a_failed_write_costs_nothing(read, capsys):
    read(rank=1, processes=2)
    assert not read.cache.exists()
    Path(read.cache).write_text("no folder")
    assert same(read(), read(cached=False))
    assert "warning: decoded images could not be saved" in capsys.readouterr().err
