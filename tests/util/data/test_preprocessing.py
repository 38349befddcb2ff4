"""Tests of the preprocessing of test images."""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2 import CenterCrop, Compose, Resize, functional

from tests.pairwise import loop_over
from util.data.preprocessing import describe_preprocessing

rng = np.random.default_rng(0)


def noise(width, height, *channels):
    return Image.fromarray(rng.integers(0, 256, (height, width, *channels), np.uint8))


@loop_over(("width", "height"), [(500, 375), (300, 420), (90, 33), (256, 256)])
def test_large_images_are_cropped_as_published(width, height):
    image = noise(width, height, 3)
    published = Compose([Resize(256), CenterCrop(224)])
    found = describe_preprocessing("imagenet", 224)(image)
    assert np.array_equal(found, published(image))
    assert describe_preprocessing("imagenet", 96)(image).size == (96, 96)


def test_images_of_a_folder_are_stretched():
    image = noise(50, 41, 3)
    expected = image.resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(describe_preprocessing("folder", 32)(image), expected)


def test_mnist_has_its_black_border_at_every_size():
    preprocessing = describe_preprocessing("mnist", 32, in_channels=1)
    image = noise(28, 28)
    pixels = functional.pil_to_tensor(image)
    for found in (functional.pil_to_tensor(preprocessing(image)), preprocessing(pixels)):
        assert torch.equal(found, F.pad(pixels, [2, 2, 2, 2]))
    large = np.asarray(preprocessing(Image.new("L", (280, 140), 255)))
    assert large.shape == (32, 32) and (large[3:-3, 3:-3] == 255).all()
    assert not large[[0, -1]].any() and not large[:, [0, -1]].any()
