"""TensorBoard event files, flushed event by event.

The SummaryWriter of tensorboardX writes from a thread. A killed process loses what that thread
still holds. A full disk ends the thread, and the caller then waits for ever.
"""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor


class Events:
    """An event file; every event is flushed before the call returns.

    Args:
        run_dir: folder of the run.
        purge_step: TensorBoard hides events of older files from this step on.
    """

    def __init__(self, run_dir: Path, purge_step: int) -> None:
        # Imported here: these take more than a second.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._summary, self._event = summary, Event
        # The suffix keeps a run resumed within the same second from overwriting the older file.
        self._file = EventsWriter(str(run_dir / "events"), f".{purge_step:08d}")
        self._add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add a scalar."""
        self._add(step, summary=self._summary.scalar(tag, value))

    def image(self, tag: str, image: Tensor, step: int) -> None:
        """Add an image (3, H, W) with values in [0, 1]."""
        self._add(step, summary=self._summary.image(tag, image.numpy()))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, step: int, **content: object) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **content))
        self._file.flush()
