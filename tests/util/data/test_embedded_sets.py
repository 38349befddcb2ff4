import torch

from util.data.datasets import DATASETS, build_loaders
from util.data.embedded_sets import FASHION_MINI, EmbeddedSet, read_fashion_mini
from util.data.loader import LoaderOptions

EMBEDDED = [name for name, entry in DATASETS.items() if isinstance(entry, EmbeddedSet)]
SIZES = {"digits": (1437, 360), "fashion-mini": (6400, 2000)}


def build(name, root, **options):
    options = LoaderOptions(batch_size=50, **options)
    return build_loaders(name, root, options, cache_dir=root / "run")


def test_classes_are_balanced_and_the_split_is_always_the_same(tmp_path):
    for name in EMBEDDED:
        spec, *loaders = build(name, tmp_path / "none")
        assert not tmp_path.joinpath("none").exists()
        assert tuple(len(loader.dataset) for loader in loaders) == SIZES[name]
        train, test = (loader.dataset.split for loader in loaders)
        parts = [torch.bincount(split.targets) / len(split.targets) for split in (train, test)]
        assert (parts[0] - parts[1]).abs().max() < 0.003
        again = build(name, tmp_path, seed=5)[2].dataset.split
        assert torch.equal(again.source.images, test.source.images)
        assert (spec.in_channels, spec.num_classes, spec.image_size) == (1, 10, 32)


def test_images_fill_the_grey_range_at_any_size(tmp_path):
    for name, image_size in [("digits", 32), ("digits", 48), ("fashion-mini", 32)]:
        source = build(name, tmp_path, image_size=image_size)[1].dataset.split.source.images
        assert source.shape == (SIZES[name][0], 1, image_size, image_size)
        assert source.min() == 0 and source.max() > 240


def test_fashion_mini_has_640_and_200_images_of_each_class_and_a_black_border(tmp_path):
    parts = read_fashion_mini()
    assert [set(torch.bincount(torch.tensor(y)).tolist()) for _, y in parts] == [{640}, {200}]
    images = build("fashion-mini", tmp_path)[2].dataset.split.source.images
    assert images[..., 2:-2, 2:-2].eq(torch.tensor(parts[1][0])[:, None]).all()
    assert images[..., :2, :].max() == images[..., :, -2:].max() == 0


def test_fashion_mini_is_small_and_its_licence_lies_beside_it():
    assert FASHION_MINI.stat().st_size < 4_000_000
    assert "Copyright (c) 2017 Zalando SE" in FASHION_MINI.with_suffix(".LICENSE").read_text()
