"""Seconds of training to a test accuracy: BatchNorm beside deconvolution, each at its best rate.

    python scripts/paper/time_to_accuracy.py --target 70 --dataset folder --data DIR
    python scripts/paper/time_to_accuracy.py --target 90 --dataset fashion --data DIR

The rate of each kind is the best of --lr, with the first seed, for trainings as long as that which
its search begins with: the best of short trainings is not that of longer ones. Then the length of
training is found, in units of --grain steps: the shortest at whose end the mean test accuracy of
all seeds has reached the target. Both are then trained once more, in turn, seed by seed, and these
runs count with their seconds of training, tests left out. Every training is a run of main.py, a
cosine over its own length. Flags unknown here go to main.py. Runs stay in --out: one that has
finished is not run again, one that was stopped goes on. The search may run beside other work; the
seconds of --out/timed compare only where nothing else runs on the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from util.cli.parser import Parser, bounded_float, bounded_int, path_name

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"BatchNorm": "False", "deconvolution": "True"}  # and their --deconv


@dataclass(frozen=True)
class Result:
    """Of one run: test top-1 in percent, and seconds of training."""

    top1: float
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """Of one kind of network.

    Args:
        screened: top-1 that each rate has reached.
        steps: of the shortest training that reaches the target at the best rate.
        runs: timed ones of that length, one for each seed.
    """

    screened: dict[float, float]
    steps: int
    runs: list[Result] = field(default_factory=list)

    @property
    def lr(self) -> float:
        """The best rate."""
        return max(self.screened, key=self.screened.__getitem__)

    @property
    def seconds(self) -> float:
        """Of training, mean over the seeds."""
        return mean(run.seconds for run in self.runs)


Train = Callable[[float, int, int], Result]  # learning rate, steps, seed


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    flags, more = parser.parse_known_args(argv)
    out = Path(flags.out)

    def train(kind: str, out: Path, lr: float, steps: int, seed: int) -> Result:
        own = {"deconv": KINDS[kind], "lr": lr, "max-steps": steps, "seed": seed}
        return run(out, own, more)

    outcomes = {
        kind: search(partial(train, kind, out), flags, begin)
        for kind, begin in zip(KINDS, flags.begin, strict=True)
    }
    for seed in flags.seeds:
        for kind, outcome in outcomes.items():
            timed = train(kind, out / "timed", outcome.lr, outcome.steps, seed)
            outcome.runs.append(timed)
    print(format_outcomes(outcomes, flags.target))


def search(train: Train, flags: Namespace, begin: int) -> Outcome:
    """The best rate of a kind of network, and the length of its training; nothing timed yet."""
    begin = max(begin // flags.grain, 1) * flags.grain
    screened = {lr: train(lr, begin, flags.seeds[0]).top1 for lr in flags.lr}
    best = max(screened, key=screened.__getitem__)

    def reach(steps: int) -> float:
        return mean(train(best, steps, seed).top1 for seed in flags.seeds)

    limits = {"begin": begin, "grain": flags.grain, "longest": flags.longest}
    return Outcome(screened, find_shortest(reach, flags.target, **limits))


def make_parser() -> Parser:
    parser = Parser("time_to_accuracy.py", __doc__.splitlines()[0])
    add = parser.add_group("what to find")
    add(
        "--target",
        "test top-1, in percent",
        bounded_float(above=0, below=100),
        required=True,
        metavar="P",
    )
    rates = [0.003, 0.01, 0.03, 0.1, 0.3]
    shown = "five from .003 to .3"
    add("--lr", "learning rates", bounded_float(above=0), rates, shown, nargs="+", metavar="LR")
    add("--seeds", "of the runs", bounded_int(0), [0, 1, 2], "0 1 2", nargs="+", metavar="N")
    add("--grain", "unit of the length of training, in steps", bounded_int(1), 25, metavar="N")
    text = "lengths to begin with: of BatchNorm, of deconvolution"
    add("--begin", text, bounded_int(1), [400, 200], "400 200", nargs=2, metavar="N")
    add("--longest", "training that is tried, in steps", bounded_int(1), 2000, metavar="N")
    add("--out", "folder of the runs", path_name, "runs/time-to-accuracy", metavar="DIR")
    return parser


def run(out: Path, own: dict[str, object], more: Sequence[str]) -> Result:
    """The result of a run of main.py in a folder of `out`, which may have it already.

    Raises:
        SystemExit: main.py has failed, with its exit code; it has said why.
    """
    folder = out / "-".join(f"{name}{value}" for name, value in own.items())
    summary = folder / "summary.json"
    if not (summary.exists() and json.loads(summary.read_text())["steps"] == own["max-steps"]):
        words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
        words += ["--run-dir", str(folder.resolve()), "--resume", "auto"]
        line = [sys.executable, "main.py", *words, *more]
        if code := subprocess.run(line, cwd=ROOT).returncode:
            raise SystemExit(code)
    figures = json.loads(summary.read_text())
    return Result(figures["test_top1"], figures["train_seconds"])


def find_shortest(
    reach: Callable[[int], float], target: float, *, begin: int, grain: int, longest: int
) -> int:
    """The shortest length of training, a multiple of `grain`, that reaches the target.

    Args:
        reach: steps -> the accuracy that so many lead to.
        begin: a multiple of `grain`, too.

    Raises:
        SystemExit: not even the longest does.
    """
    steps = begin
    while reach(steps) < target:
        steps += grain
        if steps > longest:
            raise SystemExit(f"time_to_accuracy.py: {target:g} % not reached in {longest} steps")
    while steps > grain and reach(steps - grain) >= target:
        steps -= grain
    return steps


def format_outcomes(outcomes: dict[str, Outcome], target: float) -> str:
    """A Markdown table of two rows, and the ratio of their seconds."""
    lines = [
        "| | top-1 by learning rate | best | steps | test top-1 | seconds of training | mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, outcome in outcomes.items():
        screened = ", ".join(f"{lr:g}: {top1:.1f}" for lr, top1 in outcome.screened.items())
        top1 = ", ".join(f"{run.top1:.2f}" for run in outcome.runs)
        seconds = ", ".join(f"{run.seconds:.0f}" for run in outcome.runs)
        cells = [kind, screened, f"{outcome.lr:g}", outcome.steps, top1, seconds]
        lines.append(f"| {' | '.join(map(str, cells))} | {outcome.seconds:.0f} |")
    base, ours = (outcome.seconds for outcome in outcomes.values())
    lines.append(f"\nTo {target:g} %: deconvolution is {base / ours:.2f} times as fast.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
