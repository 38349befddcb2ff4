"""Compare BatchNorm with deconvolution on a small real dataset, each at its own best rate.

    python scripts/quickstart.py [--out DIR] [FLAG of main.py ...]

The network is `simple_v2`: three convolutions and a linear layer. The data are 6,400 training and
2,000 test images of Fashion-MNIST, which this repository holds. A run is one epoch: 100 steps of
64 images. The search trains each kind of layer once at each of four learning rates. The rate with
the best test accuracy is trained with two more seeds. Both kinds are searched in the same way.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deconv.table import align
from util.tracking.logger import read_json

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"BatchNorm": "bn", "deconvolution": "deconv"}
RATES = (0.03, 0.1, 0.3, 1.0)
SEEDS = (0, 1, 2)  # the first one searches
FLAGS = (
    "--dataset fashion-mini --arch simple_v2 --batch-size 64 --epochs 1 --print-freq 5 "
    "--use-gpu False --threads 1 --tensorboard False --save-plot False"
)
RESERVED = ("--deconv", "--lr", "--learning-rate", "--seed", "--run-dir")


class RunFailed(RuntimeError):
    """A training that ended with an error; the message holds its last line."""


@dataclass(frozen=True)
class Run:
    """One training of one kind of layer."""

    kind: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{KINDS[self.kind]}-lr{self.rate:g}-seed{self.seed}"

    def describe(self) -> str:
        return f"{self.kind}, learning rate {self.rate:g}, seed {self.seed}"


Results = dict[Run, dict[str, Any] | None]  # summary.json of a run, None where it diverged


def main(argv: Sequence[str] | None = None) -> None:
    """Search, repeat the best, and print tables and verdict. Exit: 1 if a run fails, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="quickstart.py",
        description=__doc__.splitlines()[0],
        epilog="Other flags are passed on to every training.",
        allow_abbrev=False,
    )
    default = Path("runs", "quickstart", time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--out", metavar="DIR", type=Path, default=default, help="%(default)s")
    args, extra = parser.parse_known_args(argv)
    for word in extra:
        if word.partition("=")[0] in RESERVED:
            parser.error(f"{word} is not passed on: this script sets it")
    begin = time.monotonic()
    try:
        search, best, final = compare_kinds(args.out.resolve(), extra)
        plot_runs([args.out / run.name for run in final], args.out / "comparison")
    except RunFailed as error:
        raise SystemExit(f"quickstart.py: error: {error}") from None
    except KeyboardInterrupt:
        parser.exit(130, "quickstart.py: interrupted\n")
    print(f"\n{format_search(search, best)}\n\n{format_final(final, best)}\n")
    print(f"{format_verdict(final, best)}\n")
    print(f"curves: {args.out / 'comparison.png'}")
    print(f"wall-clock time: {time.monotonic() - begin:.0f} s")


def compare_kinds(out: Path, extra: Sequence[str]) -> tuple[Results, dict[str, float], Results]:
    """Return the runs of the search, the best rate of each kind, and the runs at the best rates.

    Raises:
        RunFailed: a run failed, or every rate of a kind diverged.
    """
    total = len(KINDS) * (len(RATES) + len(SEEDS) - 1)
    search = train_all([Run(k, rate, SEEDS[0]) for rate in RATES for k in KINDS], out, extra, total)
    best = {kind: choose_rate(search, kind) for kind in KINDS}
    repeats = [Run(kind, best[kind], seed) for seed in SEEDS[1:] for kind in KINDS]
    final = {run: search[run] for run in (Run(kind, best[kind], SEEDS[0]) for kind in KINDS)}
    final |= train_all(repeats, out, extra, total, len(search))
    return search, best, final


def train_all(
    runs: Sequence[Run], out: Path, extra: Sequence[str], total: int, finished: int = 0
) -> Results:
    """Train runs two at a time, with one CPU thread each; print a line for each.

    Raises:
        RunFailed: a run failed; the runs under way are stopped.
    """
    jobs = min(2, os.cpu_count() or 1)
    waiting, running, results = list(runs), {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = start_run(run, out, extra)
            time.sleep(0.05)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                results[run] = read_result(running.pop(run).returncode, out / run.name)
                accuracy = format_accuracy(results[run])
                print(f"{finished + len(results):2}/{total} {run.describe()}: {accuracy}")
                sys.stdout.flush()
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return {run: results[run] for run in runs}


def start_run(run: Run, out: Path, extra: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start main.py; its output goes to DIR/NAME.txt."""
    out.mkdir(parents=True, exist_ok=True)
    own = ["--deconv", str(run.kind == "deconvolution"), "--lr", f"{run.rate:g}"]
    own += ["--seed", str(run.seed), "--run-dir", str(out / run.name)]
    with open(out / f"{run.name}.txt", "wb") as console:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "main.py"), *FLAGS.split(), *extra, *own],
            stdout=console,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def read_result(code: int, folder: Path) -> dict[str, Any] | None:
    """Return the summary of a finished run, None for a diverged one.

    Raises:
        RunFailed: the run ended otherwise.
    """
    if (folder / "diverged.json").exists():
        return None
    if code:
        console = folder.with_name(f"{folder.name}.txt")
        lines = console.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no message")
        raise RunFailed(f"exit code {code}, see {console}: {last}")
    return read_json(folder / "summary.json")


def choose_rate(search: Results, kind: str) -> float:
    """Return the rate with the highest test top-1, the lowest such rate on a tie.

    Raises:
        RunFailed: every rate diverged.
    """
    scores = {
        run.rate: summary["test_top1"]
        for run, summary in search.items()
        if run.kind == kind and summary is not None
    }
    if not scores:
        raise RunFailed(f"{kind} diverged at every learning rate")
    return max(sorted(scores), key=scores.__getitem__)


def format_accuracy(summary: dict[str, Any] | None) -> str:
    """Return the test top-1 of a run, or "diverged"."""
    return "diverged" if summary is None else f"test top-1 {summary['test_top1']:.1f} %"


def format_search(search: Results, best: dict[str, float]) -> str:
    """Return the table of the search, best rates marked, and a note on rates at an end."""
    some = next(summary for summary in search.values() if summary)
    title = (
        f"Search: one run of {some['steps']} steps of {some['batch_size']} images at each learning "
        f"rate (seed {SEEDS[0]})\nTest top-1 in percent; * best, trained with two more seeds"
    )
    rows = [["layers", *(f"{rate:g}" for rate in RATES)]]
    for kind in KINDS:
        cells = []
        for rate in RATES:
            summary = search[Run(kind, rate, SEEDS[0])]
            text = "diverged" if summary is None else f"{summary['test_top1']:.1f}"
            cells.append(text + "*" * (rate == best[kind]))
        rows.append([kind, *cells])
    ends = [f"{kind}: {rate:g}" for kind, rate in best.items() if rate in (RATES[0], RATES[-1])]
    note = f"\nBest rates at an end of the range: {', '.join(ends)}." if ends else ""
    return f"{title}\n{align(rows)}{note}"


def select(final: Results, kind: str) -> list[dict[str, Any]]:
    """Return the summaries of the runs of a kind that did not diverge."""
    return [summary for run, summary in final.items() if run.kind == kind and summary]


def format_final(final: Results, best: dict[str, float]) -> str:
    """Return the table of the best rates, as means over the seeds."""
    rows = [["layers", "learning rate", "train loss", "test top-1 (%)", "range", "training (s)"]]
    for kind in KINDS:
        runs = select(final, kind)
        scores = [run["test_top1"] for run in runs]
        loss = mean(run["train_loss"] for run in runs)
        seconds = mean(run["train_seconds"] for run in runs)
        spread = f"{min(scores):.1f} to {max(scores):.1f}"
        cells = [f"{best[kind]:g}", f"{loss:.3f}", f"{mean(scores):.1f}", spread, f"{seconds:.1f}"]
        rows.append([kind, *cells])
    return f"Best rates: means of {count_seeds(final)}\n{align(rows)}"


def count_seeds(final: Results) -> str:
    """Return the number of finished runs per kind, in words."""
    counts = {len(select(final, kind)) for kind in KINDS}
    return " or ".join(f"{count} seed{'s' * (count > 1)}" for count in sorted(counts))


def format_verdict(final: Results, best: dict[str, float]) -> str:
    """Return one sentence: which kind has the higher test top-1, or none if ranges overlap."""
    scores = {kind: [run["test_top1"] for run in select(final, kind)] for kind in KINDS}
    steps = select(final, "BatchNorm")[0]["steps"]
    where = f"After {steps} steps, each at its own best learning rate"
    better, worse = sorted(KINDS, key=lambda kind: mean(scores[kind]), reverse=True)
    high, low = mean(scores[better]), mean(scores[worse])
    values = f"test top-1 {high:.1f} % against {low:.1f} %, mean of {count_seeds(final)}"
    if min(scores[better]) <= max(scores[worse]):
        return (
            f"{where}, {better} and {worse} do not differ by more than the seeds differ ({values})."
        )
    return f"{where}, {better} is {high - low:.1f} points better than {worse} ({values})."


def plot_runs(folders: Sequence[Path], stem: Path) -> None:
    """Draw the learning curves of the runs that did not diverge with scripts/compare.py.

    Raises:
        RunFailed: the drawing failed.
    """
    finished = [str(folder) for folder in folders if (folder / "summary.json").exists()]
    command = [sys.executable, str(ROOT / "scripts" / "compare.py"), *finished, "--out", str(stem)]
    end = subprocess.run(command, capture_output=True, text=True)
    if end.returncode:
        raise RunFailed(end.stderr.strip())


if __name__ == "__main__":
    main()
