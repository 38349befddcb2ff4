"""Signals as a wish: the step under way is finished and saved before the run ends.

SIGTERM; SIGINT, of Ctrl-C; SIGHUP, of a terminal that is closed or a connection that is lost.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from .console import speaks

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
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
    """Within the block the first signal is a wish; a SIGINT after it ends the process.

    That one is left to the system, which asks nobody: the process may be waiting for another one.
    A SIGHUP that is ignored, as below nohup, stays so.
    """
    heard, owner = 0, os.getpid()

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        heard = heard or number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not in children that load pictures. By the system's own write: the signal may have come
        # in the middle of a print.
        if speaks() and os.getpid() == owner:
            name = signal.Signals(number).name
            with suppress(OSError):  # the terminal may have gone
                os.write(2, f"\n{name}: stopping after this step; Ctrl-C: at once\n".encode())

    heeded = [signal.SIGTERM, signal.SIGINT]
    if HANGUP and signal.getsignal(HANGUP) is not signal.SIG_IGN:
        heeded.append(HANGUP)
    before = {number: signal.signal(number, hear) for number in heeded}
    try:
        yield lambda: heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
