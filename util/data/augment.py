"""Random crops and flips, each a function of (seed, epoch, index) alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from util.data.sampler import CROP, FLIP, LEFT, TOP, random_words

AREA = (0.08, 1.0)  # of a random box, relative to the image
ASPECT = (3 / 4, 4 / 3)  # of a random box, width over height
ATTEMPTS = 10  # to draw a random box that fits into the image


@dataclass(frozen=True)
class Augmentation:
    """Random crop of the padded image, then a horizontal flip with probability 0.5.

    Attributes:
        pad: pixels added on every side before the crop, 0 for no crop.
        flip: True for horizontal flips.
        fill: grey level of the border, one per channel or one for all.

    NOTE (differs from the published code, whose border is black): the border has the mean of the
    dataset. Normalisation makes the border zero, like the zero padding of convolutions
    (docs/experiments.md, section 4).
    """

    pad: int = 0
    flip: bool = False
    fill: tuple[int, ...] = (0,)

    def __call__(self, images: Tensor, seed: int, epoch: np.ndarray, index: np.ndarray) -> Tensor:
        """Return augmented images (N, C, H, W), each by the seed and its epoch and index (N,)."""

        def draw(number: int, below: int) -> Tensor:
            words = random_words(seed, epoch, index, number) % np.uint64(below)
            return torch.from_numpy(words.astype(np.int64))

        if self.pad:
            offsets = 2 * self.pad + 1
            top, left = draw(TOP, offsets), draw(LEFT, offsets)
            images = crop_padded(images, self.pad, top, left, self.fill)
        if self.flip:
            flipped = draw(FLIP, 2).bool()[:, None, None, None]
            images = torch.where(flipped, images.flip(-1), images)
        return images


NO_AUGMENTATION = Augmentation()


def crop_padded(
    images: Tensor, pad: int, top: Tensor, left: Tensor, fill: Sequence[int] = (0,)
) -> Tensor:
    """Pad images (N, C, H, W), then crop each to its old size at its own offset.

    `top` and `left` are (N,), in 0 .. 2 `pad`; see Augmentation for `fill`.
    """
    height, width = images.shape[-2:]
    padded = functional.pad(images, [pad], fill=list(fill))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # N C 2P+1 2P+1 H W, all views
    return windows[torch.arange(len(images)), :, top, left]


def random_box(
    width: int, height: int, seed: int, epoch: int, index: int
) -> tuple[int, int, int, int]:
    """Return a random box within an image, a function of (seed, epoch, index) alone.

    The distribution is that of torchvision's RandomResizedCrop, after Szegedy et al. 2015
    (https://arxiv.org/abs/1409.4842, section 6). The area is uniform in AREA, the logarithm of the
    aspect is uniform in ASPECT. Both are drawn again while the box exceeds the image. The position
    is uniform. After ATTEMPTS failures the box is the largest central one with an aspect in ASPECT.

    Returns:
        Top, left, height and width of the box, in pixels.
    """
    words = random_words(seed, epoch, index, CROP + np.arange(2 * ATTEMPTS))
    uniform = ((words >> np.uint64(11)) * 2.0**-53).reshape(2, ATTEMPTS)  # in [0, 1)
    area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * uniform[0])
    aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** uniform[1]
    sides = np.rint(np.sqrt([area * aspect, area / aspect])).astype(np.int64)  # 2 ATTEMPTS
    fits = ((sides > 0) & (sides <= [[width], [height]])).all(0)
    if not fits.any():
        wide, high = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
        return (height - high) // 2, (width - wide) // 2, high, wide
    wide, high = sides[:, fits.argmax()].tolist()
    top, left = (int(random_words(seed, epoch, index, draw)[0]) for draw in (TOP, LEFT))
    return top % (height - high + 1), left % (width - wide + 1), high, wide
