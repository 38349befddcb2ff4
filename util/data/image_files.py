"""Image files: decode on access, rotate upright, convert to RGB, crop and resize."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional

from util.data.augment import random_box
from util.data.images import Pixels
from util.errors import BadImage, DataError

# Some images of ImageNet have a corrupt EXIF header and sound pixels.
warnings.filterwarnings("ignore", "((Possibly c)|C)orrupt EXIF data", UserWarning)

# (image of any size, epoch, index) -> square image of the size of `ImageFiles`
Transform = Callable[[Image.Image, int, int], Image.Image]


@dataclass(frozen=True)
class ImageFiles:
    """Source that reads image files.

    Attributes:
        paths: of the files, as text or as bytes.
        image_size: side of the returned images, in pixels.
        transform: a `Preprocessing`, or random_crop with a size and a seed.
        skip: True reports bad images in `Pixels.bad`. False raises.
        min_size: a large JPEG may be decoded at a fraction of its size, at least `min_size` pixels.
        colour: "RGB" or "L" (grey).
    """

    paths: Sequence[str] | np.ndarray
    image_size: int
    transform: Transform
    skip: bool = False
    min_size: int | None = None
    colour: str = "RGB"

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, epoch: np.ndarray, index: np.ndarray) -> Pixels:
        """Decode and transform images.

        Raises:
            BadImage: a file cannot be decoded, and `skip` is False.
            DataError: a file cannot be read.
        """
        shape = len(index), len(self.colour), self.image_size, self.image_size  # N C H W
        images = torch.empty(shape, dtype=torch.uint8)
        count, bad = 0, {}
        for e, i in zip(epoch.tolist(), index.tolist(), strict=True):
            path = os.fsdecode(self.paths[i])
            try:
                image = open_image(path, self.min_size)
            except BadImage:
                if not self.skip:
                    raise
                bad[i] = path
                continue
            image = image if image.mode == self.colour else image.convert(self.colour)
            image = self.transform(image, e, i)
            images[count] = functional.pil_to_tensor(image)
            count += 1
        return Pixels(images[:count], bad)


def open_image(path: str, min_size: int | None = None) -> Image.Image:
    """Decode a file as RGB, rotated to its EXIF orientation; see ImageFiles for `min_size`.

    Raises:
        BadImage: the file is empty, truncated, or no image of known range.
        DataError: the file cannot be read.
    """
    try:
        with Image.open(path) as image:
            if min_size:
                image.draft(None, (min_size, min_size))
            image.load()
            with suppress(Exception):  # a damaged EXIF header raises anything
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except Exception as error:  # decoders raise anything from OSError to struct.error
        if getattr(error, "errno", None) is not None:
            raise DataError(f"cannot read the image {path}: {error.strerror}") from None
        raise BadImage(f"cannot decode the image {path}: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB; drop transparency, scale 16-bit grey to 8 bits."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of no known range")
    if image.mode.startswith("I"):  # 16 bits, which `convert` alone would clip to 8
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    elif image.mode == "P":
        image = image.convert("RGBA")  # else Pillow warns of transparent palettes
    return image.convert("RGB")


def random_crop(
    image: Image.Image, epoch: int, index: int, *, image_size: int, seed: int
) -> Image.Image:
    """Crop a box of 8 to 100 % of the image and resize the box, see `random_box`."""
    box = random_box(*image.size, seed, epoch, index)
    return functional.resized_crop(image, *box, [image_size, image_size])
