"""Image files: decode on access, rotate upright, convert to RGB, crop and resize."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageOps, features
from torchvision.transforms.v2 import functional

from util.data import MAX_IMAGE_PIXELS
from util.data.augment import random_box
from util.data.images import Pixels
from util.errors import BadImage, DataError

# Some images of ImageNet have a corrupt EXIF header and sound pixels.
warnings.filterwarnings("ignore", "((Possibly c)|C)orrupt EXIF data", UserWarning)

Image.MAX_IMAGE_PIXELS = None  # `open_image` has its own limit, which a flag sets

ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".avif", ".jp2"),
    *(".ppm", ".pgm", ".bmp", ".tif", ".tiff"),
)
GREY_BITS = (8, 12, 16)  # of cameras and scanners; a file may store 12 in 16, and 16 in 32

Colour = tuple[int, ...]  # red, green and blue, or one grey level; 0 .. 255

# (image of any size, epoch, index) -> square image of the size of `ImageFiles`
Transform = Callable[[Image.Image, int, int], Image.Image]


@cache
def readable_endings() -> tuple[str, ...]:
    """Return the endings, in lower case, of image files that this Pillow can decode."""
    known = Image.registered_extensions()  # a Pillow without WebP or AVIF leaves them out
    lacking = () if features.check("jpg_2000") else (".jp2",)
    return tuple(ending for ending in ENDINGS if ending in known and ending not in lacking)


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
        background: colour behind transparent pixels.
        max_pixels: images of more pixels are bad.
        transparent: indices of the images with transparent pixels that this process has read.
    """

    paths: Sequence[str] | np.ndarray
    image_size: int
    transform: Transform
    skip: bool = False
    min_size: int | None = None
    colour: str = "RGB"
    background: Colour = (0, 0, 0)
    max_pixels: int = MAX_IMAGE_PIXELS
    transparent: set[int] = field(default_factory=set)

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
                image = open_image(path, self.min_size, self.max_pixels)
            except BadImage:
                if not self.skip:
                    raise
                bad[i] = path
                continue
            if image.mode == "RGBA":
                self.transparent.add(i)
            image = compose(image, self.background)
            image = image if image.mode == self.colour else image.convert(self.colour)
            image = self.transform(image, e, i)
            images[count] = functional.pil_to_tensor(image)
            count += 1
        return Pixels(images[:count], bad)


def open_image(
    path: str, min_size: int | None = None, max_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    """Decode a file as RGB, or RGBA if pixels are transparent, in its EXIF orientation.

    Args:
        path: of the file.
        min_size: see ImageFiles.
        max_pixels: most pixels; larger images may fill the memory.

    Raises:
        BadImage: the file is empty, truncated, too large, or no image of known range.
        DataError: the file cannot be read.
    """
    try:
        with Image.open(path) as image:
            if (pixels := image.width * image.height) > max_pixels:
                raise ValueError(f"{pixels} pixels, more than --max-image-pixels {max_pixels}")
            if min_size:
                image.draft(None, (min_size, min_size))
            image.load()
            with suppress(Exception):  # a damaged EXIF header raises anything
                ImageOps.exif_transpose(image, in_place=True)
            return to_colours(image)
    except Exception as error:  # decoders raise anything from OSError to struct.error
        if getattr(error, "errno", None) is not None:
            raise DataError(f"cannot read the image {path}: {error.strerror}") from None
        raise BadImage(f"cannot decode the image {path}: {error}") from None


def to_colours(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, or to RGBA if a pixel is transparent."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = scale_grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            return image
    return image.convert("RGB")


def scale_grey(image: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits to 8 bits.

    Floating-point values are in [0, 1]. Integers have the smallest of GREY_BITS that holds the
    largest one, or as many bits as the largest one needs.

    Raises:
        ValueError: pixels are negative, NaN, or floating-point numbers above 1.
    """
    values = np.asarray(image)
    low, high = values.min().item(), values.max().item()
    if not (low >= 0 and (high <= 1 or image.mode != "F")):  # NaN compares as False
        known = "floating-point numbers in 0 .. 1" if image.mode == "F" else "0 and above"
        raise ValueError(f"its pixels are in {low:g} .. {high:g}, not {known}; convert them first")
    if image.mode == "F":
        return Image.fromarray((255 * values).round().astype(np.uint8))
    bits = next((bits for bits in GREY_BITS if high < 2**bits), high.bit_length())
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8))


def compose(image: Image.Image, background: Colour) -> Image.Image:
    """Return an image as RGB, with a background behind its transparent pixels."""
    if image.mode == "RGB":
        return image
    behind = Image.new("RGBA", image.size, background * (3 // len(background)))
    return Image.alpha_composite(behind, image).convert("RGB")


def grey_levels(mean: Sequence[float]) -> Colour:
    """Return a mean per channel, of pixels in [0, 1], as a colour."""
    return tuple(round(255 * value) for value in mean)


def random_crop(
    image: Image.Image, epoch: int, index: int, *, image_size: int, seed: int
) -> Image.Image:
    """Crop a box of 8 to 100 % of the image and resize the box, see `random_box`."""
    box = random_box(*image.size, seed, epoch, index)
    return functional.resized_crop(image, *box, [image_size, image_size])
