"""Run main.py for thousands of steps and check that no resource use grows (soak test).

    python scripts/dev/soak.py                                 2,000 steps of a small network
    python scripts/dev/soak.py --steps 500 --rows 5 -- --deconv False -j 2

The table divides the run into equal parts: median processor time of a step, which other work on the
machine does not change; resident memory at the end; largest number of open files. The exit code is
1 if the last part exceeds LIMITS relative to the second; the first part still fills caches. Words
after -- are flags of main.py. Linux only.
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
LIMITS = {"milliseconds": 1.25, "MiB": 1.02, "files": 1.0}  # last part relative to the second


class Sample(NamedTuple):
    """Resource use of the process after a step."""

    seconds: float  # processor time
    resident: float  # MiB
    files: int


class Part(NamedTuple):
    """Row of the table."""

    step: int
    milliseconds: float
    MiB: float
    files: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("soak.py", __doc__.splitlines()[0])
    add = parser.add_group("run")
    add("--steps", "optimizer steps", bounded_int(6), 2000, metavar="N")
    add("--rows", "rows of the table", bounded_int(3), 10, metavar="N")
    add("words", "flags of main.py, after --", nargs="*", metavar="FLAG")
    flags = parser.parse_args(argv)
    if flags.steps < 2 * flags.rows:
        parser.error(f"--steps {flags.steps}: too few for --rows {flags.rows}")
    parts = summarize(watch([*RUN.split(), *flags.words], flags.steps), flags.rows)
    for part in (Part._fields, *((p.step, *(f"{v:.1f}" for v in p[1:])) for p in parts)):
        print("| " + " | ".join(str(cell).rjust(12) for cell in part) + " |")
    if growth := find_growth(parts):
        sys.exit(f"soak.py: {growth}")


def watch(words: Sequence[str], steps: int) -> list[Sample]:
    """Run main.py in this process; return the resource use after each step."""
    samples, batch = [], Recorder.batch

    def record(recorder: Recorder, *args: object) -> None:
        batch(recorder, *args)
        files = len(os.listdir("/proc/self/fd"))
        samples.append(Sample(time.process_time(), read_resident("VmRSS"), files))

    with tempfile.TemporaryDirectory() as folder, patch.object(Recorder, "batch", record):
        run = ["--run-dir", f"{folder}/run", "--epochs", "1000000", "--max-steps", str(steps)]
        program.main([*words, *run])
    return samples


def summarize(samples: Sequence[Sample], rows: int) -> list[Part]:
    """Divide the run into `rows` equal parts."""
    ends = [len(samples) * (row + 1) // rows for row in range(rows)]
    parts = []
    for start, end in zip([0, *ends], ends, strict=False):
        part = samples[start:end]
        times = [b.seconds - a.seconds for a, b in pairwise(part)]
        milliseconds = 1000 * statistics.median(times)
        files = max(sample.files for sample in part)
        parts.append(Part(end, milliseconds, part[-1].resident, files))
    return parts


def find_growth(parts: Sequence[Part]) -> str | None:
    """Return a message about the first resource beyond LIMITS, None without one."""
    second, last = parts[1]._asdict(), parts[-1]._asdict()
    for name, limit in LIMITS.items():
        if last[name] > limit * second[name]:
            return f"{name} grew from {second[name]:.1f} to {last[name]:.1f}"
    return None


if __name__ == "__main__":
    main()
