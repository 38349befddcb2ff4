import numpy as np
import pytest
import torch

from tests.pairwise import loop_over
from util.data import AUTO_AUGMENT
from util.data.augment import Augmentation
from util.data.images import DataSpec, InMemory, Split
from util.data.loader import ImageLoader, LoaderOptions
from util.data.random_transforms import NO_TRANSFORMS, build_transforms

SIZE, CLASSES = 23, 7
generator = torch.Generator().manual_seed(0)
IMAGES = torch.randint(256, (SIZE, 3, 32, 32), dtype=torch.uint8, generator=generator)
TARGETS = torch.arange(SIZE) % CLASSES
NAMES = tuple("abcdefg")
SPEC = DataSpec("set", 3, 32, NAMES, (0.5,) * 3, (0.25,) * 3)
ALPHAS = {"mixup": 0.4, "cutmix": 1}
ALL = {"auto_augment": "ra", "random_erase": 0.5, **ALPHAS}
INDEX = np.arange(SIZE)


def loader(bad=(), epoch=1, start=0, train=True, spec=SPEC, images=IMAGES, **options):
    options = LoaderOptions(**{"batch_size": 8, "seed": 3, **options})
    split = Split(InMemory(images, dict(bad)), TARGETS)
    flip = Augmentation(flip=True)
    made = ImageLoader(spec, split, options, train=train, augmentation=flip)
    made.batch_sampler.set_epoch(epoch, start)
    return made


def same(one, two):
    pairs = zip(one, two, strict=True)
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


def mixed_by_hand(**alphas):
    """Return plain batches, the mixed ones of the loader, and the shares of the first images."""
    plain, mixed = list(loader()), list(loader(**alphas))
    for (_, targets), (_, soft) in zip(plain, mixed, strict=True):
        own, other = torch.nn.functional.one_hot(targets, CLASSES), targets.roll(1)
        differ = targets != other
        shares = soft[torch.arange(len(soft)), targets]
        (share,) = set(shares[differ].tolist())  # one of the whole batch
        expected = share * own + (1 - share) * own.roll(1, 0)
        torch.testing.assert_close(soft, expected)
        yield share


def test_mixup_adds_the_image_before_in_the_share_of_its_class():
    shares = list(mixed_by_hand(mixup=1.0))
    for share, (images, _), (mixed, _) in zip(shares, loader(), loader(mixup=1.0), strict=True):
        torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))
    assert len(set(shares)) == 3  # another share for each batch


def test_cutmix_pastes_the_image_before_in_the_share_of_its_class():
    shares = list(mixed_by_hand(cutmix=1.0))
    for share, (images, _), (mixed, _) in zip(shares, loader(), loader(cutmix=1.0), strict=True):
        pasted = (mixed == images.roll(1, 0)) & (mixed != images)
        assert torch.equal(torch.where(pasted, images.roll(1, 0), images), mixed)
        assert pasted.float().mean() == pytest.approx(1 - share, abs=0.01)


def test_with_both_each_batch_draws_one_of_them():
    plain, mixed = (list(loader(batch_size=2, **more)) for more in ({}, ALPHAS))
    pasted = [
        bool(((new == old) | (new == old.roll(1, 0))).all())
        for (old, _), (new, _) in zip(plain, mixed, strict=True)
    ]
    assert set(pasted[:-1]) == {True, False}  # the last batch has one image


def test_transforms_repeat_for_any_workers_start_and_state_of_the_generator():
    whole = list(loader(**ALL))
    torch.manual_seed(5)
    before, number = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert same(loader(**ALL), whole)
    finally:
        torch.set_num_threads(number)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(loader(num_workers=2, **ALL), whole)
    assert same(loader(start=1, **ALL), whole[1:])
    for other in (loader(epoch=2, **ALL), loader(seed=4, **ALL)):
        assert not same(other, whole)


def test_the_parts_of_a_mixed_batch_are_that_batch():
    for processes in [2, 3, 5]:  # the last batch has 7 images
        parts = [loader(rank=rank, processes=processes, **ALL) for rank in range(processes)]
        for whole, *shares in zip(loader(**ALL), *parts, strict=True):
            together = [torch.cat(tensors) for tensors in zip(*shares, strict=True)]
            assert same([whole], [together])


@loop_over("name", AUTO_AUGMENT[1:])
def test_a_policy_draws_anew_for_each_image(name):
    policy = build_transforms(SPEC, auto_augment=name).policy
    copies = IMAGES[:1].expand(SIZE, -1, -1, -1).clone()
    found = policy(copies, 0, np.zeros_like(INDEX), INDEX)
    assert found.dtype == torch.uint8 and len(found.flatten(1).unique(dim=0)) > 4
    alone = policy(IMAGES[:1].clone(), 0, np.zeros(1, np.int64), INDEX[9:10])
    assert torch.equal(alone[0], found[9])


def test_a_policy_fills_with_the_mean_of_the_dataset():
    white = torch.full((SIZE, 3, 32, 32), 255, dtype=torch.uint8)
    spec = DataSpec("set", 3, 32, NAMES, (0.2, 0.4, 0.6), (1,) * 3)
    policy = build_transforms(spec, auto_augment="ta_wide").policy
    pixels = policy(white, 0, np.zeros_like(INDEX), INDEX).movedim(1, -1).reshape(-1, 3)
    assert (pixels == torch.tensor([51, 102, 153])).all(1).sum() > 100


def test_erasing_sets_rectangles_to_the_mean_of_the_dataset_in_some_images():
    for share, low, high in ((0.5, 5, 18), (1.0, 23, 23)):
        batches = zip(loader(), loader(random_erase=share), strict=True)
        pairs = [pair for (a, _), (b, _) in batches for pair in zip(a, b, strict=True)]
        erased = [new for old, new in pairs if not torch.equal(old, new)]
        assert low <= len(erased) <= high
        for old, new in pairs:
            assert torch.equal(torch.where(new == 0, old, new), old)


def test_grey_images_and_tests_and_empty_parts_are_met():
    grey = DataSpec("set", 1, 32, NAMES, (0.5,), (0.25,))
    for name in AUTO_AUGMENT[1:]:
        options = {**ALL, "auto_augment": name}
        for images, _ in loader(spec=grey, images=IMAGES[:, :1], **options):
            assert images.shape[1:] == (1, 32, 32) and images.isfinite().all()
    assert loader(train=False, **ALL).dataset.transforms == NO_TRANSFORMS
    assert same(loader(train=False, **ALL), loader(train=False))
    *_, (images, targets) = loader(batch_size=22, rank=1, processes=2, **ALL)  # 1 image for two
    assert images.shape == (0, 3, 32, 32) and len(targets) == 0
    (_, (images, targets)) = loader(batch_size=22, mixup=1.0)  # alone, hence unmixed
    torch.testing.assert_close(images, list(loader(batch_size=22))[1][0])
    assert targets.max() == 1


def test_a_bad_file_is_left_out_of_a_mixture():
    for bad in INDEX.tolist():
        found = list(loader({bad: "bad"}, mixup=0.4, rank=1, processes=2))
        whole = list(loader({bad: "bad"}, rank=1, processes=2))
        for (mixed, soft), (images, targets) in zip(found, whole, strict=True):
            assert mixed.shape == images.shape and len(soft) == len(targets)
            assert (soft.gather(1, targets[:, None]) > 0).all()
