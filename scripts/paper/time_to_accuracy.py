"""Measure the training time to a test accuracy, each kind of layer at its best learning rate.

    python scripts/paper/time_to_accuracy.py --target 70 --dataset folder --data DIR
    python scripts/paper/time_to_accuracy.py --target 90 --dataset fashion --data DIR

1. The first seed finds the best of the rates --lr, in trainings of --begin steps. A much shorter
   training has another best rate.
2. A search in units of --grain steps finds the shortest training whose mean test accuracy over all
   seeds reaches the target.
3. Both kinds repeat their shortest training in turn, seed by seed. The table shows the training
   time of these runs, without tests.

Every training is a run of main.py with a cosine schedule over its own length. Other flags are
passed on to main.py. A finished run in --out is not repeated, an interrupted run continues. Only
the runs in --out/timed need an otherwise idle machine.
"""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper.records import ROOT
from scripts.paper.runner import read_summary
from scripts.paper.tables import KINDS, format_table
from util.cli.parser import Parser, bounded_float, bounded_int, path_name

Summary = dict[str, Any]  # of a run
Train = Callable[[float, int, int], Summary]  # learning rate, steps, seed


@dataclass(frozen=True)
class Outcome:
    """Search result of one kind of layers."""

    screened: dict[float, float]  # top-1 in percent by learning rate
    steps: int  # of the shortest training that reaches the target at the best rate
    runs: list[Summary] = field(default_factory=list)  # timed runs, one per seed

    @property
    def lr(self) -> float:
        """Return the best learning rate."""
        return max(self.screened, key=self.screened.__getitem__)

    @property
    def seconds(self) -> float:
        """Return the mean training time over the seeds."""
        return mean(run["train_seconds"] for run in self.runs)


def main(argv: Sequence[str] | None = None) -> None:
    flags, passed = make_parser().parse_known_args(argv)
    out = Path(flags.out)

    def train(kind: str, out: Path, lr: float, steps: int, seed: int) -> Summary:
        own = {"deconv": kind == "deconv", "lr": lr, "max-steps": steps, "seed": seed}
        return run(out, own, passed)

    pairs = zip(KINDS, flags.begin, strict=True)
    outcomes = {kind: search(partial(train, kind, out), flags, begin) for kind, begin in pairs}
    for seed in flags.seeds:
        for kind, outcome in outcomes.items():
            outcome.runs.append(train(kind, out / "timed", outcome.lr, outcome.steps, seed))
    print(format_outcomes(outcomes, flags.target))


def search(train: Train, flags: Namespace, begin: int) -> Outcome:
    """Find the best learning rate of one kind of layers and the shortest training, untimed.

    Raises:
        SystemExit: the longest training does not reach the target.
    """
    grain, steps = flags.grain, max(begin // flags.grain, 1) * flags.grain
    screened = {lr: train(lr, steps, flags.seeds[0])["test_top1"] for lr in flags.lr}
    best = Outcome(screened, steps).lr

    def reaches(steps: int) -> bool:
        return mean(train(best, steps, seed)["test_top1"] for seed in flags.seeds) >= flags.target

    while not reaches(steps):
        steps += grain
        if steps > flags.longest:
            raise SystemExit(
                f"time_to_accuracy.py: {flags.target:g} % not reached in {flags.longest} steps"
            )
    while steps > grain and reaches(steps - grain):
        steps -= grain
    return Outcome(screened, steps)


def make_parser() -> Parser:
    parser = Parser("time_to_accuracy.py", __doc__.splitlines()[0])
    add, percent = parser.add_group("search"), bounded_float(above=0, below=100)
    text = "test top-1 to reach, in percent"
    add("--target", text, percent, required=True, metavar="P")
    rates = [0.003, 0.01, 0.03, 0.1, 0.3]
    text = "learning rates to try"
    add("--lr", text, bounded_float(above=0), rates, "0.003 to 0.3", nargs="+", metavar="LR")
    add("--seeds", "seeds of the runs", bounded_int(0), [0, 1, 2], "0 1 2", nargs="+", metavar="N")
    add("--grain", "unit of training length, in steps", bounded_int(1), 25, metavar="N")
    text = "training length to begin with, in steps: BatchNorm, deconvolution"
    add("--begin", text, bounded_int(1), [400, 200], "400 200", nargs=2, metavar="N")
    add("--longest", "longest training to try, in steps", bounded_int(1), 2000, metavar="N")
    add("--out", "write runs to this folder", path_name, "runs/time-to-accuracy", metavar="DIR")
    return parser


def run(out: Path, own: dict[str, object], passed: Sequence[str]) -> Summary:
    """Return the summary of a run of main.py, made in a folder of `out` unless it is there.

    Raises:
        SystemExit: main.py has failed; with its exit code.
    """
    folder = out / "-".join(f"{name}{value}" for name, value in own.items())
    summary = read_summary(folder)
    if summary is None or summary["steps"] != own["max-steps"]:
        words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
        words += ["--run-dir", str(folder.resolve()), "--resume", "auto"]
        line = [sys.executable, "main.py", *words, *passed]
        if code := subprocess.run(line, cwd=ROOT).returncode:
            raise SystemExit(code)
        summary = read_summary(folder)
    assert summary is not None  # main.py has written it
    return summary


def format_outcomes(outcomes: dict[str, Outcome], target: float) -> str:
    """Return a Markdown table of two rows, and the ratio of their training times."""
    header = ["layers", "top-1 (%) by lr", "best lr", "steps", "top-1 (%)", "training (s)"]
    rows = []
    for kind, outcome in outcomes.items():
        screened = ", ".join(f"{lr:g}: {top1:.1f}" for lr, top1 in outcome.screened.items())
        top1 = ", ".join(f"{run['test_top1']:.2f}" for run in outcome.runs)
        seconds = ", ".join(f"{run['train_seconds']:.0f}" for run in outcome.runs)
        cells = [KINDS[kind], screened, f"{outcome.lr:g}", outcome.steps, top1, seconds]
        rows.append([*cells, f"{outcome.seconds:.0f}"])
    ratio = outcomes["bn"].seconds / outcomes["deconv"].seconds
    table = format_table([*header, "mean (s)"], rows)
    return f"{table}\nTo {target:g} %: deconvolution is {ratio:.2f} times as fast."


if __name__ == "__main__":
    main()
