"""Errors that end a run with one line instead of a traceback, and a text for any value."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

from torch import Tensor

MAX_COUNT = 2**62  # larger integers are described by their size


class RunError(RuntimeError):
    """Flags, files or devices with which a run cannot start; the message names them."""


class CheckpointError(RuntimeError):
    """Unusable checkpoint; the message names the file and the reason."""


class ContentError(ValueError):
    """Checkpoint content of a wrong form; the message names the first such key and its value."""


class DataError(RuntimeError):
    """Fault of the data that the user can repair; the message names the file and the repair."""

    def __init__(self, message: str) -> None:
        # A loader worker puts a traceback in front of the message. Only the message is kept.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2])


class BadImage(DataError):
    """Readable file without a decodable image."""


class Stopped(Exception):
    """Stop on a signal, raised after the current step, in all processes at the same step.

    Attributes:
        number: of the signal. SIGTERM in a process that received none itself.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number or signal.SIGTERM).name)
        self.number = number or signal.SIGTERM


class TrainingDiverged(RuntimeError):
    """Training loss or gradient that is not finite.

    Attributes:
        batch: number in the epoch, from 1.
        images: (N, C, H, W), the part of the batch that this process has.
        parameters: parameters whose gradient is not finite.
    """

    def __init__(
        self, message: str, batch: int, images: Tensor, parameters: Sequence[Tensor] = ()
    ) -> None:
        super().__init__(message)
        self.batch, self.images, self.parameters = batch, images, parameters


class PeerFailed(RuntimeError):
    """Failure of another process, which reports the reason itself."""


def describe(value: Any) -> str:
    """Describe any value in a few words, however large or nested it is."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if type(value) is int and abs(value) >= MAX_COUNT:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)):
        return repr(value[:40]) + ("..." if len(value) > 40 else "")
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    size = f" of {len(value)}" if isinstance(value, (dict, list, tuple, set)) else ""
    return f"a {type(value).__name__}{size}"
