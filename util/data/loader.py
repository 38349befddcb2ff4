"""Loaders: a split of images as the batches of one process, augmented and normalised."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from util.data.augment import Augmentation
from util.data.images import DataSpec, Split, is_good
from util.data.sampler import EpochBatches, Key
from util.errors import DataError

MIN_IMAGE_SIZE = 32  # pixels, the side of the smallest image that the networks take
TEST_BATCH = 256  # images at most: the figures of a test depend on no larger batch size

T = TypeVar("T")


def check_arguments(
    batch_size: int, num_workers: int, image_size: int, on_bad_image: str = "error"
) -> None:
    """Refuse by name what no data set can serve, before any file is touched.

    Raises:
        ValueError: naming the argument and its value.
    """
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size must be at least {MIN_IMAGE_SIZE} pixels, got {image_size}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}")
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image must be 'error' or 'skip', got {on_bad_image!r}")


class ImageSet(Dataset):
    """A split as the loader wants it: keys (epoch, index) in, one finished batch out.

    Works on whole batches (`__getitems__`), because a call for each image would cost more than
    the image.
    """

    def __init__(
        self,
        spec: DataSpec,
        split: Split,
        *,
        seed: int = 0,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.spec, self.split, self.seed = spec, split, seed
        self.augmentation = augmentation or Augmentation()

    def __len__(self) -> int:
        return len(self.split.targets)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor, list[str]]:
        """Images (N, C, H, W) float32 normalised, targets (N,) int64, and the bad files left out.

        N is the number of keys less that of the bad files, and may be 0.
        """
        epoch, index = np.array(keys, np.int64).reshape(-1, 2).T
        images, bad = self.split.source.read(epoch, index)
        good = is_good(index, bad)
        images = self.augmentation(images, self.seed, epoch[good], index[good])
        images = functional.to_dtype(images, torch.float32, scale=True)
        images = functional.normalize(images, self.spec.mean, self.spec.std, inplace=True)
        return images, self.split.targets[torch.from_numpy(index[good])], list(bad.values())


class ImageLoader(DataLoader):
    """Iterates over batches (images (N, C, H, W) float32 normalised, targets (N,) int64).

    Training, all processes together see the batches of one process: each takes its part of every
    batch (see `EpochBatches`). Call `loader.batch_sampler.set_epoch(epoch)` before each epoch: the
    order depends on (seed, epoch) alone, what chance does to a image on (seed, epoch, index)
    alone, whatever the workers and processes and whatever else draws random numbers.

    Testing, the order is that of the data set, in batches of TEST_BATCH images at most, which
    are dealt whole: every image once, and no figure depends on the number of processes.

    N is 0 where the part of a process is empty, or all its images are bad files left out.

    Args:
        train: True for the batches of training, False for those of testing.
        batch_size: images in a training batch, over all processes.
        num_workers: processes that prepare batches for this one; 0 prepares them in this one.
        seed: of the order and of the augmentation.
        device_type: "cuda" gives pinned memory.
        rank, processes: the number of this process among those that train, and how many they are.

    Attributes:
        skipped: names of the bad files that this process has left out so far.
    """

    def __init__(
        self,
        spec: DataSpec,
        split: Split,
        *,
        train: bool,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        device_type: str = "cpu",
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        super().__init__(
            ImageSet(spec, split, seed=seed, augmentation=augmentation),
            batch_sampler=EpochBatches(
                len(split.targets),
                batch_size if train else min(batch_size, TEST_BATCH),
                seed=seed,
                shuffle=train,
                rank=rank,
                processes=processes,
                whole=not train,
            ),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=as_is,
            worker_init_fn=heed_parent_alone,
            pin_memory=device_type == "cuda",
            generator=torch.Generator(),  # else each epoch would draw from the global one
        )
        self.skipped: set[str] = set()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with _tell_of_lost_workers() if self.num_workers else nullcontext():
            batches = super().__iter__()
            # Torch would raise the loss of a worker wherever this process is just then, in the
            # middle of a step. Without its handler it is found where the next batch is waited for.
            if self.num_workers and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for images, targets, skipped in batches:
                self.skipped.update(skipped)
                yield images, targets


def count_images(train: ImageLoader, test: ImageLoader) -> dict[str, int]:
    """How many there are, by words for an error."""
    names = "number of training images", "number of test images"
    return {name: len(one.dataset) for name, one in zip(names, (train, test), strict=True)}


@contextmanager
def _tell_of_lost_workers() -> Iterator[None]:
    """Turn PyTorch's error into one that says what can be done."""
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        # The latter two are of a batch that was on its way when its worker was killed.
        cut = not isinstance(error, RuntimeError) and not str(error).startswith("Caught")
        if not (cut or str(error).startswith("DataLoader worker (pid")):
            raise
        raise DataError(
            "a process that loads images was killed: is memory short, or shared memory "
            "(/dev/shm, --shm-size of a container)? Fewer of them need less: -j 1, or -j 0 for none"
        ) from error


def heed_parent_alone(worker: int) -> None:
    """Let SIGTERM end this process, which loads images, only where its parent has sent it.

    torchrun, Slurm and systemd ask every process of a run to stop, but the step in which the parent
    notices may want further images.
    """
    if hasattr(signal, "sigwaitinfo"):  # macOS and Windows do not tell who has sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_end, daemon=True).start()


def _await_end() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def as_is(batch: T) -> T:
    """Collate nothing: the set hands over finished batches. Named, so that it pickles."""
    return batch
