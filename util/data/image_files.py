"""Image files: decoded on access, made upright RGB, and cut or resized to one size."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional

from util.data.augment import random_box
from util.data.images import Pixels
from util.errors import BadImage, DataError

# Some images of ImageNet carry such a header; their pixels are fine.
warnings.filterwarnings("ignore", "((Possibly c)|C)orrupt EXIF data", UserWarning)

# (RGB image of any size, image_size, epoch, index) -> (image_size, image_size)
View = Callable[[Image.Image, int, int, int], Image.Image]


class ImageFiles:
    """Image files as a source.

    Args:
        view: what of a image is seen: whole_image, centre_crop, or random_crop with its seed.
        skip: whether bad images are reported as `Pixels.bad`, or raised.
        at_least: pixels; a large JPEG may be decoded at a fraction of its size, not below this.
    """

    def __init__(
        self,
        paths: Sequence[str],
        image_size: int,
        view: View,
        *,
        skip: bool = False,
        at_least: int | None = None,
    ) -> None:
        # One array: workers that count references in a million strings would come to own copies.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.image_size, self.view, self.skip, self.at_least = image_size, view, skip, at_least

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, epoch: np.ndarray, index: np.ndarray) -> Pixels:
        """Decode and cut images.

        Raises:
            BadImage: naming a file that cannot be decoded, unless `skip`.
            DataError: naming a file that cannot be read at all.
        """
        images = torch.empty(len(index), 3, self.image_size, self.image_size, dtype=torch.uint8)
        done, bad = 0, {}
        for e, i in zip(epoch.tolist(), index.tolist(), strict=True):
            path = os.fsdecode(self.paths[i])
            try:
                image = open_image(path, self.at_least)
            except BadImage:
                if not self.skip:
                    raise
                bad[i] = path
                continue
            seen = self.view(image, self.image_size, e, i)
            images[done] = torch.from_numpy(np.array(seen)).permute(2, 0, 1)
            done += 1
        return Pixels(images[:done], bad)


def open_image(path: str, at_least: int | None = None) -> Image.Image:
    """Decode a file as RGB, turned as its EXIF orientation says.

    Args:
        at_least: see ImageFiles.

    Raises:
        BadImage: naming a file that is empty, cut short, or no image of known range.
        DataError: naming a file that cannot be read: that is no fault of the image.
    """
    try:
        with Image.open(path) as image:
            if at_least:
                image.draft(None, (at_least, at_least))
            image.load()
            return to_rgb(upright(image))
    except Exception as error:  # the decoders raise anything from OSError to struct.error
        if getattr(error, "errno", None) is not None:
            raise DataError(f"cannot read the image {path}: {error.strerror}") from None
        raise BadImage(f"cannot decode the image {path}: {error}") from None


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; as it is if that cannot be understood."""
    with suppress(Exception):  # a damaged header raises anything; the pixels are fine all the same
        ImageOps.exif_transpose(image, in_place=True)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any kind of image as RGB; transparency is dropped, 16-bit grey keeps its range.

    Raises:
        ValueError: floating-point pixels, which have no range to go by.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of no known range")
    if image.mode.startswith("I"):  # 16 bits; `convert` alone would clip them to 8
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    elif image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns of a transparent palette
    return image.convert("RGB")


def whole_image(image: Image.Image, image_size: int, epoch: int, index: int) -> Image.Image:
    """The whole image; its aspect is not kept."""
    if image.size == (image_size, image_size):
        return image
    return image.resize((image_size, image_size), Image.Resampling.BILINEAR)


def centre_crop(image: Image.Image, image_size: int, epoch: int, index: int) -> Image.Image:
    """The middle of the image, whose shorter side is first made 256/224 of image_size."""
    image = functional.resize(image, [round(image_size / 224 * 256)])
    return functional.center_crop(image, [image_size])


def random_crop(
    image: Image.Image, image_size: int, epoch: int, index: int, *, seed: int
) -> Image.Image:
    """A box of 8 to 100 % of the image, by (seed, epoch, index) alone; see `random_box`."""
    box = random_box(*image.size, seed, epoch, index)
    return functional.resized_crop(image, *box, [image_size, image_size])
