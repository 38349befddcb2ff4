"""SIGTERM and SIGINT as a wish: the step under way is finished and saved before the run ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from .console import speaks

Wish = Callable[[], int]  # the number of the signal that asks to stop, 0 as long as none does


def no_wish() -> int:
    return 0


class Stopped(Exception):
    """A signal has asked the run to end, and the step it came in is done; in all processes at once.

    Attributes:
        number: of the signal; SIGTERM in a process that only another one's wish has stopped.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number or signal.SIGTERM).name)
        self.number = number or signal.SIGTERM


@contextmanager
def heed_signals() -> Iterator[Wish]:
    """Within the block the first SIGTERM or SIGINT is a wish; a SIGINT after it ends the process.

    That one is left to the system, which asks nobody: the process may be waiting for another one.
    """
    heard = 0

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        heard = heard or number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if speaks():  # by the system's own write: the signal may have come in the middle of a print
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: stopping after this step; Ctrl-C: at once\n".encode())

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
