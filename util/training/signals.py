"""Signals as a stop_request: the step under way is finished and saved before the run ends.

SIGTERM; SIGINT, of Ctrl-C; SIGHUP, of a terminal that is closed or a connection that is lost.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from util.checkpoint.store import (
    LATEST_NAME,
)
from util.console import is_muted
from util.errors import Stopped


@contextmanager
def tell_where_to_continue(run_dir: Path | None, images: str = "") -> Iterator[None]:
    """Turn Ctrl-C and `Stopped` into one line that names the last checkpoint, and an exit code.

    Args:
        run_dir: None: say nothing.
        images: what names them on the command line, which --resume does not know.

    Raises:
        SystemExit: 130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP.
    """
    try:
        yield
    except (KeyboardInterrupt, Stopped) as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        if run_dir is not None:
            path = run_dir / LATEST_NAME
            again = " ".join(["--resume", shlex.quote(str(path)), *filter(None, [images])])
            hint = f"continue with {again}" if path.exists() else "nothing was saved yet"
            with suppress(OSError):  # the terminal may have gone
                print(f"\ninterrupted: {hint}", file=sys.stderr)
        sys.exit(128 + number)


HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
StopRequest = Callable[
    [], int
]  # the number of the signal that asks to stop, 0 as long as none does


def never_stop() -> int:
    return 0


@contextmanager
def heed_signals() -> Iterator[StopRequest]:
    """Within the block the first signal is a wish; a SIGINT after it ends the process.

    That one is left to the system, which asks nobody: the process may be waiting for another one.
    A SIGHUP that is ignored, as below nohup, stays so.
    """
    heard, owner = 0, os.getpid()

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        heard = heard or number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not in children that load images. By the system's own write: the signal may have come
        # in the middle of a print.
        if not is_muted() and os.getpid() == owner:
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
