"""TensorBoard event files, flushed event by event.

The SummaryWriter of tensorboardX writes from a thread. A killed process loses what that thread
still holds. A full disk ends the thread, and the caller then waits for ever.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

FLAGS_SUFFIX = ".flags"


class Events:
    """Event file; every event is flushed before the call returns.

    Args:
        run_dir: folder of the run; created if missing.
        purge_step: TensorBoard hides events of older files from this step on. None hides nothing.
        suffix: end of the name of the file; "" means `purge_step`, which keeps a run resumed within
            the same second from overwriting the older file.
    """

    def __init__(self, run_dir: Path, purge_step: int | None, suffix: str = "") -> None:
        # Imported here: these take more than a second.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._summary, self._event = summary, Event
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(run_dir / "events"), suffix or f".{purge_step:08d}")
        if purge_step is not None:
            self._add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add a scalar."""
        self._add(step, summary=self._summary.scalar(tag, value))

    def image(self, tag: str, image: Tensor, step: int) -> None:
        """Add an image (3, H, W) with values in [0, 1]."""
        self._add(step, summary=self._summary.image(tag, image.numpy()))

    def text(self, tag: str, text: str, step: int) -> None:
        """Add a text in Markdown."""
        self._add(step, summary=self._summary.text(tag, text))

    def hparams(self, values: Mapping[str, Any]) -> None:
        """Add the columns of the HParams tab; TensorBoard adds the last value of every scalar."""
        _, start, _ = self._summary.hparams(values, {})
        self._add(0, summary=start)

    def finished(self) -> None:
        """Give the run the status "success" in the HParams tab."""
        *_, end = self._summary.hparams({}, {})
        self._add(0, summary=end)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, step: int, **content: object) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **content))
        self._file.flush()


def open_flags(run_dir: Path, flags: Mapping[str, Any]) -> Events:
    """Write flags as a text page and as hyperparameters; return their event file.

    TensorBoard shows the first hyperparameters of a run. A resumed run may have other ones, such as
    --epochs, so it replaces this file.
    """
    for path in run_dir.glob(f"events.out.tfevents.*{FLAGS_SUFFIX}"):
        path.unlink()
    events = Events(run_dir, None, FLAGS_SUFFIX)
    rows = [f"| {name} | `{value}` |\n" for name, value in flags.items()]
    events.text("flags", "".join(["| flag | value |\n", "| --- | --- |\n", *rows]), 0)
    lists = {name: str(value) for name, value in flags.items() if isinstance(value, list)}
    events.hparams({**flags, **lists})
    return events
