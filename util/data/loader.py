"""Loaders: iterate over a split in augmented, normalised batches of one process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert
from torchvision.transforms.v2 import functional

from util.data import MAX_IMAGE_PIXELS, MIN_IMAGE_SIZE
from util.data.augment import NO_AUGMENTATION, Augmentation
from util.data.images import DataSpec, Split, Subset, is_good
from util.data.random_transforms import NO_TRANSFORMS, RandomTransforms, build_transforms
from util.data.sampler import EpochBatches, Key
from util.errors import DataError

MAX_TEST_BATCH = 256  # images; test metrics do not depend on larger batch sizes


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Options that the loaders of all datasets share.

    Attributes:
        batch_size: images in a training batch, over all processes.
        image_size: side in pixels, at least MIN_IMAGE_SIZE.
        num_workers: processes that prepare batches for this process. 0: this process does.
        seed: of order and augmentation.
        device_type: "cuda" pins the memory of the batches.
        rank: number of this process.
        processes: world size.
        auto_augment, random_erase, mixup, cutmix: of training images, see `build_transforms`.
        on_bad_image: "error" stops at an image that cannot be decoded. "skip" leaves the image out
            of its batch and names the file in `ImageLoader.skipped`.
        val_split: fraction of the training images to hold out, see `build_train_loader`.
        max_image_pixels: a file with more pixels counts as one that cannot be decoded.

    Raises:
        ValueError: naming the argument and its value.
    """

    batch_size: int
    image_size: int = MIN_IMAGE_SIZE
    num_workers: int = 0
    seed: int = 0
    device_type: str = "cpu"
    rank: int = 0
    processes: int = 1
    auto_augment: str = "off"
    random_erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    on_bad_image: str = "error"
    val_split: float = 0.0
    max_image_pixels: int = MAX_IMAGE_PIXELS

    def __post_init__(self) -> None:
        least = {
            "image_size": MIN_IMAGE_SIZE,
            "batch_size": 1,
            "num_workers": 0,
            "max_image_pixels": 1,
        }
        for name, minimum in least.items():
            if (value := getattr(self, name)) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        if self.on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image must be 'error' or 'skip', got {self.on_bad_image!r}")

    @property
    def skip_bad_images(self) -> bool:
        return self.on_bad_image == "skip"


@dataclass(frozen=True)
class ImageSet(Dataset):
    """Dataset for DataLoader: takes keys (epoch, index, batch), returns a finished batch.

    The class works on whole batches (`__getitems__`), which is faster than a call per image.
    """

    spec: DataSpec
    split: Split
    seed: int = 0
    augmentation: Augmentation = NO_AUGMENTATION
    transforms: RandomTransforms = NO_TRANSFORMS

    def __len__(self) -> int:
        return len(self.split.targets)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor, list[str]]:
        """Return a batch, without its bad files; a mixture also without its first key.

        Returns:
            Normalised images (N, C, H, W) float32, their targets, and the names of the bad files.
            N is the number of good files, 0 or more. Targets are (N,) int64, of mixed images the
            shares of the classes (N, classes) float32.
        """
        epoch, index, batch = np.array(keys, np.int64).reshape(-1, 3).T
        images, bad = self.split.source.read(epoch, index)
        good = is_good(index, bad)
        key = self.seed, epoch[good], index[good]
        policy, erase, mix = self.transforms
        images = self.augmentation(images, *key)
        images = policy(images, *key) if policy else images
        images = functional.to_dtype(images, torch.float32, scale=True)
        images = functional.normalize(images, self.spec.mean, self.spec.std, inplace=True)
        images = erase(images, *key) if erase else images
        targets = self.split.targets[torch.from_numpy(index[good])]
        if mix and len(images):
            extra = int(good[0])  # 0 where the file of the first key is bad
            mixed = mix(images, targets, self.seed, epoch[0], batch[0])
            images, targets = (part[extra:] for part in mixed)
        return images, targets, list(bad.values())


class ImageLoader(DataLoader):
    """Loader of batches: normalised images (N, C, H, W) float32 and targets, see `ImageSet`.

    `EpochBatches` defines the part of this process. N is 0 if the part is empty or holds bad files
    only. Call `loader.batch_sampler.set_epoch(epoch)` before each training epoch. The augmentation
    of an image depends on (seed, epoch, index) alone, a mixture on (seed, epoch, batch) and its two
    images. Test batches have at most MAX_TEST_BATCH images.

    Attributes:
        skipped: names of the bad files that this process has left out.
        validation: of a training loader, the loader of the held-out images; None: there are none.
    """

    def __init__(
        self,
        spec: DataSpec,
        split: Split,
        options: LoaderOptions,
        *,
        train: bool,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:
        batch_size = options.batch_size if train else min(options.batch_size, MAX_TEST_BATCH)
        transforms = NO_TRANSFORMS
        if train:
            transforms = build_transforms(
                spec,
                auto_augment=options.auto_augment,
                random_erase=options.random_erase,
                mixup=options.mixup,
                cutmix=options.cutmix,
            )
        super().__init__(
            ImageSet(spec, split, options.seed, augmentation, transforms),
            batch_sampler=EpochBatches(
                len(split.targets),
                batch_size,
                seed=options.seed,
                train=train,
                rank=options.rank,
                processes=options.processes,
                mixed=transforms.mix is not None,
            ),
            num_workers=options.num_workers,
            persistent_workers=options.num_workers > 0,
            collate_fn=default_convert,  # a batch comes finished from ImageSet
            worker_init_fn=ignore_foreign_sigterm,
            pin_memory=options.device_type == "cuda",
            generator=torch.Generator(),  # else each epoch draws from the global generator
        )
        self.skipped: set[str] = set()
        self.validation: ImageLoader | None = None

    def draw_images(self, count: int) -> Tensor:
        """Return `count` images of the split, or all, normalised and not augmented, on every rank.

        The seed draws the images. Bad files are left out.
        """
        plain = ImageSet(self.dataset.spec, self.dataset.split)
        return plain.__getitems__(self.batch_sampler.draw_keys(count))[0]

    def image_numbers(self, batch: int) -> list[int]:
        """Return the numbers in the dataset of the images of a batch (from 0) of this epoch."""
        index, source = self.batch_sampler.images(batch), self.dataset.split.source
        return source.positions[index].tolist() if isinstance(source, Subset) else index

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with _explain_lost_worker() if self.num_workers else nullcontext():
            batches = super().__iter__()
            # Torch's SIGCHLD handler raises the loss of a worker in the middle of a step. Without
            # the handler, the wait for the next batch raises the loss.
            if self.num_workers and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for images, targets, skipped in batches:
                self.skipped.update(skipped)
                yield images, targets


def count_images(*loaders: ImageLoader) -> dict[str, int]:
    """Return the numbers of training, test and validation images, keyed by a phrase for errors."""
    names = [f"number of {part} images" for part in ("training", "test", "validation")]
    return dict(zip(names, (len(loader.dataset) for loader in loaders), strict=False))


@contextmanager
def _explain_lost_worker() -> Iterator[None]:
    """Turn PyTorch's error about a killed worker into a DataError with advice."""
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        # EOFError and ConnectionError: the worker was killed while it sent a batch.
        interrupted = not isinstance(error, RuntimeError) and not str(error).startswith("Caught")
        if not (interrupted or str(error).startswith("DataLoader worker (pid")):
            raise
        raise DataError(
            "a process that loads images was killed: is memory short, or shared memory "
            "(/dev/shm, --shm-size of a container)? Fewer workers need less: -j 1, or -j 0 for none"
        ) from error


def ignore_foreign_sigterm(worker: int) -> None:
    """Let SIGTERM end this loader worker only if the parent process sent the signal.

    torchrun, Slurm and systemd send SIGTERM to every process of a run. The last step of the parent
    may still need images of the worker.
    """
    if hasattr(signal, "sigwaitinfo"):  # macOS and Windows do not report the sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parent_sigterm, daemon=True).start()


def _exit_on_parent_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
