"""Graceful shutdown on SIGTERM, SIGINT or SIGHUP: finish the current step, save, exit."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from util.console import is_muted

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none

StopRequest = Callable[[], int]  # -> number of the signal that asks to stop, 0 if none does


def never_stop() -> int:
    """Return 0: no signal asks to stop."""
    return 0


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first signal within the block into a stop request; the next SIGINT kills.

    SIGHUP stays ignored where it is ignored, as below nohup. Python handles signals in the main
    thread alone: in another thread no signal is a stop request.
    """
    if threading.current_thread() is not threading.main_thread():
        yield never_stop
        return
    received, owner = 0, os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = received or number
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # for a process that waits for another
        # Children that load images stay silent. A signal may interrupt `print`, so use os.write.
        if not is_muted() and os.getpid() == owner:
            name = signal.Signals(number).name
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{name}: stopping after this step; Ctrl-C: at once\n".encode())

    numbers = [signal.SIGTERM, signal.SIGINT]
    if HANGUP and signal.getsignal(HANGUP) is not signal.SIG_IGN:
        numbers.append(HANGUP)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
