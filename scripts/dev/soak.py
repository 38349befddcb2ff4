"""A long run of main.py, looked at as it goes on: does it take ever more of anything?

    python scripts/dev/soak.py                                 2,000 steps of a small network
    python scripts/dev/soak.py --steps 500 --rows 5 -- --deconv False -j 2

A table of the run in equal parts: the median time of a step on the processor, which other work on
the machine does not change, memory at the end of each part, and the most files open. Exit code 1 if
the last part has more of anything than LIMITS allow, compared to the second; the first still fills
caches. Words after -- are flags of main.py. Linux only.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import main as program
from scripts.bench.steps import read_resident
from util.cli.parser import Parser, bounded_int
from util.training.recorder import Recorder

RUN = "--dataset digits --arch simple_v2 --deconv True -b 8 --lr .01 --threads 1 --use-gpu False"
LIMITS = {"milliseconds": 1.25, "MiB": 1.02, "files": 1.0}  # the last part by the second


class Moment(NamedTuple):
    """What the process has taken by a step."""

    seconds: float  # of processor time
    resident: float  # MiB
    files: int


class Part(NamedTuple):
    """A row of the table."""

    step: int
    milliseconds: float
    MiB: float
    files: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("soak.py", __doc__.splitlines()[0])
    add = parser.add_group("how long")
    add("--steps", "optimizer steps", bounded_int(6), 2000, metavar="N")
    add("--rows", "parts of the table", bounded_int(3), 10, metavar="N")
    add("words", "flags of main.py, after --", nargs="*", metavar="FLAG")
    flags = parser.parse_args(argv)
    if flags.steps < 2 * flags.rows:
        parser.error(f"--steps {flags.steps}: too few for --rows {flags.rows}")
    parts = summarise(watch([*RUN.split(), *flags.words], flags.steps), flags.rows)
    for part in (Part._fields, *((p.step, *(f"{v:.1f}" for v in p[1:])) for p in parts)):
        print("| " + " | ".join(str(cell).rjust(12) for cell in part) + " |")
    if grown := find_growth(parts):
        sys.exit(f"soak.py: {grown}")


def watch(words: Sequence[str], steps: int) -> list[Moment]:
    """Run main.py in this process for so many steps; what it had taken by each."""
    moments, batch = [], Recorder.batch

    def look(recorder: Recorder, *args: object) -> None:
        batch(recorder, *args)
        files = len(os.listdir("/proc/self/fd"))
        moments.append(Moment(time.process_time(), read_resident("VmRSS"), files))

    with tempfile.TemporaryDirectory() as folder, patch.object(Recorder, "batch", look):
        run = ["--run-dir", f"{folder}/run", "--epochs", "1000000", "--max-steps", str(steps)]
        program.main([*words, *run])
    return moments


def summarise(moments: Sequence[Moment], rows: int) -> list[Part]:
    """The run in `rows` equal parts."""
    ends = [len(moments) * (row + 1) // rows for row in range(rows)]
    parts = []
    for start, end in zip([0, *ends], ends, strict=False):
        part = moments[start:end]
        times = [b.seconds - a.seconds for a, b in pairwise(part)]
        milliseconds = 1000 * statistics.median(times)
        files = max(moment.files for moment in part)
        parts.append(Part(end, milliseconds, part[-1].resident, files))
    return parts


def find_growth(parts: Sequence[Part]) -> str | None:
    """What the last part has more of than LIMITS allow, and by how much; None for nothing."""
    second, last = parts[1]._asdict(), parts[-1]._asdict()
    for name, limit in LIMITS.items():
        if last[name] > limit * second[name]:
            return f"{name} have grown from {second[name]:.1f} to {last[name]:.1f}"
    return None


if __name__ == "__main__":
    main()
