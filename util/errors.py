"""TODO: util/errors.py."""

from __future__ import annotations

import signal

from torch import Tensor


class RunError(RuntimeError):
    """A run that cannot be started as asked."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or continued; the message names the file and why."""


class ContentError(ValueError):
    """Content that this program does not write; the message names the first place and value."""


class DataError(RuntimeError):
    """A fault of the data that the user can mend; the message says what, where and how."""

    def __init__(self, message: str) -> None:
        # A worker of the loader hands its error on with a traceback in front: keep the sentence.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2])


class BadImage(DataError):
    """A file that is there and can be read, but holds no image that can be decoded."""


class Stopped(Exception):
    """A signal has asked the run to end, and the step it came in is done; in all processes at once.

    Attributes:
        number: of the signal; SIGTERM in a process that only another one's wish has stopped.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number or signal.SIGTERM).name)
        self.number = number or signal.SIGTERM


class TrainingDiverged(RuntimeError):
    """The training loss or a gradient is not finite any more.

    Attributes:
        batch: number in the epoch, from 1.
        images: the images of this process.
    """

    def __init__(self, message: str, batch: int, images: Tensor) -> None:
        super().__init__(message)
        self.batch, self.images = batch, images


class PeerFailed(RuntimeError):
    """Another process has failed, and told why."""
