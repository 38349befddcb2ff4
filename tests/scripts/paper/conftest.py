"""Images that the recipes' tests share."""

import pytest
import torch
from PIL import Image


@pytest.fixture
def image_folder(tmp_path):
    """Return a folder of noise: train and test images of two classes, eight each."""
    for part, name in (("train", "cat"), ("train", "dog"), ("test", "cat"), ("test", "dog")):
        folder = tmp_path / "images" / part / name
        folder.mkdir(parents=True)
        for number in range(8):
            noise = torch.randint(256, (32, 32, 3), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    return tmp_path / "images"
