"""Random crops and mirror images, for a whole batch of uint8 pictures at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from .sampling import FLIP, LEFT, TOP, random_words


@dataclass(frozen=True)
class Augmentation:
    """A random crop of the picture padded with black, then its mirror image half of the time.

    Attributes:
        pad: pixels added on every side before the crop, 0 for no crop.
        flip: whether to mirror left and right.
    """

    pad: int = 0
    flip: bool = False

    def __call__(self, images: Tensor, seed: int, epoch: np.ndarray, index: np.ndarray) -> Tensor:
        """Augment pictures (N, C, H, W), each by (seed, epoch, index) alone.

        Args:
            epoch, index: (N,) integers.
        """

        def draw(number: int, below: int) -> Tensor:
            words = random_words(seed, epoch, index, number) % np.uint64(below)
            return torch.from_numpy(words.astype(np.int64))

        if self.pad:
            places = 2 * self.pad + 1
            images = crop_padded(images, self.pad, draw(TOP, places), draw(LEFT, places))
        if self.flip:
            mirrored = draw(FLIP, 2).bool()[:, None, None, None]
            images = torch.where(mirrored, images.flip(-1), images)
        return images


def crop_padded(images: Tensor, pad: int, top: Tensor, left: Tensor) -> Tensor:
    """Pad pictures with zeros, then cut each to its old size at its own place.

    Args:
        images: (N, C, H, W).
        pad: pixels on every side, P.
        top, left: (N,) in 0 .. 2P.
    """
    height, width = images.shape[-2:]
    padded = functional.pad(images, [pad])
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # N C 2P+1 2P+1 H W, all views
    return windows[torch.arange(len(images)), :, top, left]
