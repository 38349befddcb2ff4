import torch

from util.data.augment import NO_AUGMENTATION, Augmentation
from util.data.images import DataSpec, InMemory, Split
from util.data.loader import MAX_TEST_BATCH, ImageLoader, ImageSet, LoaderOptions

SIZE = 23
IMAGES = torch.arange(SIZE * 3 * 4 * 4).remainder(251).to(torch.uint8).reshape(SIZE, 3, 4, 4)
TARGETS = torch.arange(SIZE) % 7
SPEC = DataSpec("set", 3, 4, ("a", "b"), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
SPLIT = Split(InMemory(IMAGES), TARGETS)
CROP_AND_FLIP = Augmentation(pad=2, flip=True)


def loader(split=SPLIT, train=True, **options):
    options = LoaderOptions(**{"batch_size": 8, "seed": 3, **options})
    augmentation = CROP_AND_FLIP if train else NO_AUGMENTATION
    return ImageLoader(SPEC, split, options, train=train, augmentation=augmentation)


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_batches_are_normalised_images_with_their_targets():
    images, targets, skipped = ImageSet(SPEC, SPLIT).__getitems__([(0, 5, 0), (0, 2, 0)])
    mean, std = (torch.tensor(values)[:, None, None] for values in (SPEC.mean, SPEC.std))
    torch.testing.assert_close(images, (IMAGES[[5, 2]] / 255 - mean) / std)
    assert targets.tolist() == [5, 2] and targets.dtype == torch.int64 and skipped == []
    assert SPEC.num_classes == 2


def test_an_image_alone_is_the_image_in_its_batch():
    data = ImageSet(SPEC, SPLIT, seed=3, augmentation=CROP_AND_FLIP)
    keys = [(1, 4, 0), (2, 4, 0), (2, 9, 0)]
    images, targets, _ = data.__getitems__(keys)
    for i, key in enumerate(keys):
        assert same(data.__getitems__([key])[:2], (images[i : i + 1], targets[i : i + 1]))


def test_the_parts_of_a_batch_are_that_batch_pixel_for_pixel():
    for workers in [0, 2]:
        for processes in [2, 3, 5]:
            one, *parts = (
                loader(rank=rank, processes=n, num_workers=workers)
                for rank, n in [(0, 1), *((rank, processes) for rank in range(processes))]
            )
            for each in (one, *parts):
                each.batch_sampler.set_epoch(2)
            assert {len(part) for part in parts} == {len(one)} == {3}
            for whole, *shares in zip(one, *parts, strict=True):
                images, targets = (torch.cat(tensors) for tensors in zip(*shares, strict=True))
                assert same(whole, (images, targets))


def test_drawn_images_are_the_same_on_every_rank_and_not_augmented():
    drawn = [loader(rank=rank, processes=2).draw_images(5) for rank in range(2)]
    assert torch.equal(*drawn)
    plain = ImageSet(SPEC, SPLIT).__getitems__([(0, index, 0) for index in range(SIZE)])[0]
    places = [(plain == image).flatten(1).all(1).nonzero().item() for image in drawn[0]]
    assert len(set(places)) == 5 and places != sorted(places)
    assert not torch.equal(drawn[0], loader(seed=4).draw_images(5))
    assert len(loader(Split(InMemory(IMAGES, {3: "three"}), TARGETS)).draw_images(99)) == SIZE - 1


def test_an_empty_part_is_a_batch_of_no_images():
    for workers in [0, 2]:
        few = Split(InMemory(IMAGES[:2]), TARGETS[:2])
        ((images, targets),) = loader(few, rank=2, processes=3, num_workers=workers)
        assert images.shape == (0, 3, 4, 4) and images.dtype == torch.float32
        assert targets.shape == (0,) and targets.dtype == torch.int64


def test_test_batches_are_dealt_whole():
    for processes in [2, 3, 5]:
        one = list(loader(train=False))
        for rank in range(processes):
            dealt = loader(train=False, rank=rank, processes=processes)
            assert len(dealt) == len(one[rank::processes])
            for batch, expected in zip(dealt, one[rank::processes], strict=True):
                assert same(batch, expected)


def test_a_test_batch_stays_the_same_beyond_its_limit():
    many = Split(InMemory(IMAGES[:1].expand(300, 3, 4, 4)), TARGETS[:1].expand(300))
    for batch_size in (256, 300):
        test = loader(many, train=False, batch_size=batch_size)
        assert (
            [len(targets) for _, targets in test]
            == [MAX_TEST_BATCH, 300 - MAX_TEST_BATCH]
            == [256, 44]
        )
    assert [len(targets) for _, targets in loader(many, batch_size=300)] == [300]


def test_files_left_out_come_back_to_the_process_that_asked():
    for workers in [0, 2]:
        bad = {1: "one", 9: "nine", **{i: str(i) for i in range(16, SIZE)}}
        broken = loader(Split(InMemory(IMAGES, bad), TARGETS), train=False, num_workers=workers)
        assert broken.skipped == set()
        whole, found = list(loader(train=False)), list(broken)
        assert broken.skipped == set(bad.values())
        for number, (batch, expected) in enumerate(zip(found, whole, strict=True)):
            good = [i for i in range(len(expected[1])) if 8 * number + i not in bad]
            assert same(batch, [tensor[good] for tensor in expected])
        assert found[2][0].shape == (0, 3, 4, 4)


def test_an_image_left_out_changes_no_other():
    entire, broken = loader(), loader(Split(InMemory(IMAGES, {9: "nine"}), TARGETS))
    for (images, targets), (some, their) in zip(entire, broken, strict=True):
        kept = [i for i, image in enumerate(images) if any(torch.equal(image, x) for x in some)]
        assert same((some, their), (images[kept], targets[kept]))
    assert sum(len(targets) for _, targets in broken) == SIZE - 1
