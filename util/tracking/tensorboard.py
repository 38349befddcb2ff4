"""TensorBoard events, written as they come.

tensorboardX's own SummaryWriter hands them to a thread: what that has not yet written is lost when
the process is killed, and a full disk ends the thread, after which the caller waits for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor


class Events:
    """An event file, each event on its way to the disk when the call returns.

    Args:
        run_dir: the folder.
        purge_step: what older event files of the folder tell of this step and later is hidden.
    """

    def __init__(self, run_dir: Path, purge_step: int) -> None:
        # Here: they take more than a second to import.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._summary, self._event = summary, Event
        # The suffix keeps a run resumed within the same second from overwriting the older file.
        self._file = EventsWriter(str(run_dir / "events"), f".{purge_step:08d}")
        self._add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, tag: str, value: float, step: int) -> None:
        self._add(step, summary=self._summary.scalar(tag, value))

    def image(self, tag: str, image: Tensor, step: int) -> None:
        """`image`: 3 H W in [0, 1]."""
        self._add(step, summary=self._summary.image(tag, image.numpy()))

    def close(self) -> None:
        self._file.close()

    def _add(self, step: int, **content: object) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **content))
        self._file.flush()


class NullEvents:
    """Events that are not wanted."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None
