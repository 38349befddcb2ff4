"""Apply torchvision's random transforms, each seeded by its image or its batch.

torchvision draws from torch's global generator, once per call. Each image therefore has its own
call, which is seeded by the key of the image. The global generator keeps its state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torchvision.transforms import v2

from util.data.images import DataSpec
from util.data.sampler import ERASE, MIX, POLICY, random_words
from util.random_state import seeded


@dataclass(frozen=True)
class ImageTransform:
    """Transform of single images (C, H, W), seeded by (seed, epoch, index, draw)."""

    transform: Callable[[Tensor], Tensor]
    draw: int

    def __call__(self, images: Tensor, seed: int, epoch: np.ndarray, index: np.ndarray) -> Tensor:
        """Transform images (N, C, H, W) in place, each by the seed and its epoch and index (N,)."""
        words = random_words(seed, epoch, index, self.draw).tolist()
        for image, word in zip(images, words, strict=True):
            with seeded(word):
                image.copy_(self.transform(image))
        return images


@dataclass(frozen=True)
class BatchTransform:
    """Transform of images (N, C, H, W) and targets (N,), seeded by (seed, epoch, batch)."""

    transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def __call__(
        self, images: Tensor, targets: Tensor, seed: int, epoch: int, batch: int
    ) -> tuple[Tensor, Tensor]:
        """Return mixed images (N, C, H, W) and the shares of their classes (N, classes)."""
        with seeded(int(random_words(seed, epoch, batch, MIX)[0])):
            return self.transform(images, targets)


class RandomTransforms(NamedTuple):
    """Transforms of training images beside crop and flip; None: not applied.

    The order is that of torchvision's reference script.

    Attributes:
        policy: of uint8 images, after crop and flip.
        erase: of normalised images.
        mix: of finished batches.
    """

    policy: ImageTransform | None = None
    erase: ImageTransform | None = None
    mix: BatchTransform | None = None


NO_TRANSFORMS = RandomTransforms()


def build_transforms(
    spec: DataSpec,
    *,
    auto_augment: str = "off",
    random_erase: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
) -> RandomTransforms:
    """Return torchvision's transforms, with the settings of its reference script.

    Args:
        spec: the dataset. Its mean fills the pixels that a policy leaves empty.
        auto_augment: a name in AUTO_AUGMENT.
        random_erase: probability to set a random rectangle of an image to the mean.
        mixup: parameter of the beta distribution of shares; 0 is off.
        cutmix: as `mixup`. With both, each batch draws one of them.
    """
    mixes = [
        kind(alpha=float(alpha), num_classes=spec.num_classes)  # torchvision refuses integers
        for kind, alpha in {v2.MixUp: mixup, v2.CutMix: cutmix}.items()
        if alpha
    ]
    fill = [round(255 * mean) for mean in spec.mean]
    policy = _build_policy(auto_augment, fill) if auto_augment != "off" else None
    return RandomTransforms(
        policy=policy and ImageTransform(policy, POLICY),
        erase=ImageTransform(v2.RandomErasing(random_erase), ERASE) if random_erase else None,
        mix=BatchTransform(v2.RandomChoice(mixes)) if mixes else None,
    )


def _build_policy(name: str, fill: list[int]) -> v2.Transform:
    settings = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": fill}
    kinds = {"ra": v2.RandAugment, "ta_wide": v2.TrivialAugmentWide, "augmix": v2.AugMix}
    if name in kinds:
        return kinds[name](**settings)
    return v2.AutoAugment(v2.AutoAugmentPolicy(name), **settings)
