"""Hold out validation images from the training images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from util.data.augment import NO_AUGMENTATION, Augmentation
from util.data.images import DataSpec, Source, Split, Subset
from util.data.loader import ImageLoader, LoaderOptions
from util.data.sampler import HOLD_OUT, random_words
from util.errors import DataError


def choose_held_out(
    targets: np.ndarray, fraction: float, seed: int, classes: Sequence[str]
) -> np.ndarray:
    """Return a mask (N,) of the images to hold out, a function of the arguments alone.

    The mask holds out the rounded fraction of each class: at least one image, and not all.

    Raises:
        DataError: a class has a single image.
    """
    words = random_words(seed, 0, np.arange(len(targets)), HOLD_OUT)
    held_out = np.zeros(len(targets), bool)
    for target, name in enumerate(classes):
        images = np.flatnonzero(targets == target)
        if len(images) == 1:
            reason = f"the class {name} has a single training image; add some, or leave this out"
            raise DataError(f"--val-split {fraction:g}: {reason}")
        count = min(max(round(fraction * len(images)), 1), len(images) - 1)
        held_out[images[np.argsort(words[images], kind="stable")[:count]]] = True
    return held_out


def build_train_loader(
    spec: DataSpec,
    split: Split,
    options: LoaderOptions,
    *,
    augmentation: Augmentation = NO_AUGMENTATION,
    plain: Source | None = None,
) -> ImageLoader:
    """Return the training loader, and in its `validation` the loader of the held-out images.

    Args:
        spec: description of the dataset.
        split: all training images.
        options: `val_split` is the fraction to hold out; 0 holds out none.
        augmentation: of training images.
        plain: the same images, preprocessed as test images are; None: those of `split`.
    """
    if not options.val_split:
        return ImageLoader(spec, split, options, train=True, augmentation=augmentation)
    targets = split.targets.numpy()
    held_out = choose_held_out(targets, options.val_split, options.seed, spec.classes)

    def take(source: Source, mask: np.ndarray) -> Split:
        return Split(Subset(source, np.flatnonzero(mask)), split.targets[torch.from_numpy(mask)])

    part = take(split.source, ~held_out)
    loader = ImageLoader(spec, part, options, train=True, augmentation=augmentation)
    part = take(plain or split.source, held_out)
    loader.validation = ImageLoader(spec, part, options, train=False)
    return loader
