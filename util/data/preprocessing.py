"""Describe and apply the preprocessing of test images, for tests, predictions and exports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional
from torchvision.transforms.v2.functional import InterpolationMode

ImageOrBatch = TypeVar("ImageOrBatch", Image.Image, Tensor)
PADDED = ("mnist", "fashion", "fashion-mini")  # 28 x 28 images, padded to 32 x 32
CROPPED = ("imagenet", "dummy")


@dataclass(frozen=True)
class Preprocessing:
    """Steps from a decoded image to pixels of the network's size, in the order of the attributes.

    Attributes:
        colour: "RGB" or "L" (grey), a mode of Pillow.
        pad: width of the black border on each side, as a fraction of the image's side.
        resize: length of the shorter side with `keep_aspect`, else of both sides, in pixels.
        keep_aspect: False stretches the image to a square.
        crop: side of the central square, in pixels.
        interpolation: of the resize, antialiased; a value of torchvision's InterpolationMode.
    """

    colour: str
    pad: float
    resize: int
    keep_aspect: bool
    crop: int
    interpolation: str = "bilinear"

    def __call__(self, image: ImageOrBatch, epoch: int = 0, index: int = 0) -> ImageOrBatch:
        """Pad, resize and crop an image or uint8 tensors (..., H, W); see `Transform`."""
        if self.pad:
            sides = functional.get_size(image)[::-1]  # W H
            image = functional.pad(image, [round(self.pad * side) for side in sides])
        size = [self.resize] * (1 if self.keep_aspect else 2)
        image = functional.resize(image, size, InterpolationMode(self.interpolation))
        return functional.center_crop(image, [self.crop])

    @property
    def min_size(self) -> int | None:
        """Least side at which a large JPEG may be decoded, in pixels; None: at its full size."""
        return None if self.keep_aspect else 2 * self.resize


def describe_preprocessing(dataset: str, image_size: int, in_channels: int = 3) -> Preprocessing:
    """Return the preprocessing of a dataset's test images.

    Args:
        dataset: one of `util.data.datasets.DATASETS`, or "imagenet" or "dummy".
        image_size: side of the network's input, in pixels.
        in_channels: channels of the network's input, 1 or 3.

    Example:
        >>> describe_preprocessing("imagenet", 224).resize
        256
    """
    return Preprocessing(
        colour="L" if in_channels == 1 else "RGB",
        pad=1 / 14 if dataset in PADDED else 0.0,
        resize=round(image_size / 224 * 256) if dataset in CROPPED else image_size,
        keep_aspect=dataset in CROPPED,
        crop=image_size,
    )
