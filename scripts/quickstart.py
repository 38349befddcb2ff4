"""Compare BatchNorm with deconvolution on a small real dataset, each at its own best learning rate.

    python scripts/quickstart.py [--out DIR] [FLAG of main.py ...]

The network is `simple_v2`: three convolutions and a linear layer. The data are 6,400 training and
2,000 test images of Fashion-MNIST, which this repository holds. A run is one epoch: 100 steps of
64 images. The search trains each kind of layer once at each of four learning rates. The rate with
the best test accuracy is trained with two more seeds. Both kinds are searched in the same way.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deconv.table import align
from main import build_script
from scripts import compare
from scripts.paper import runner
from util.cli.parser import Parser
from util.cli.settings import read_settings
from util.training.signals import stop_on_signal

KINDS = {"BatchNorm": "bn", "deconvolution": "deconv"}
RATES = (0.03, 0.1, 0.3, 1.0)
SEEDS = (0, 1, 2)  # the first one searches
FLAGS = (
    "--dataset fashion-mini --arch simple_v2 --batch-size 64 --epochs 1 --print-freq 5 "
    "--use-gpu False --threads 1 --tensorboard False --save-plot False"
)


class RunFailed(RuntimeError):
    """Training that ended with an error; the message holds its last line."""


@dataclass(frozen=True)
class Run:
    """One training of one kind of layer."""

    kind: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{KINDS[self.kind]}-lr{self.rate:g}-seed{self.seed}"

    def list_flags(self, out: Path) -> list[str]:
        """Return the flags of main.py that this script sets for each run."""
        deconv, folder = str(self.kind == "deconvolution"), str(out / self.name)
        flags = ["--deconv", deconv, "--lr", f"{self.rate:g}", "--seed", str(self.seed)]
        return [*flags, "--run-dir", folder]


Results = dict[Run, dict[str, Any] | None]  # summary.json of a run, None where it diverged


def main(argv: Sequence[str] | None = None) -> None:
    """Search, repeat the best, and print tables and verdict.

    Raises:
        SystemExit: code 2 for bad flags, 1 if a run fails, 128 + number by a signal.
    """
    text = "Other flags are passed on to every training."
    parser = Parser("quickstart.py", __doc__.splitlines()[0], text)
    default = Path("runs", "quickstart", time.strftime("%Y%m%d-%H%M%S"))
    text = "folder for the runs (default: %(default)s)"
    parser.add_argument("--out", metavar="DIR", type=Path, default=default, help=text)
    args, extra = parser.parse_known_args(argv)
    check_flags(extra, parser)
    begin = time.monotonic()
    try:
        search, best, final = compare_kinds(args.out.resolve(), extra)
        finished = [str(args.out / run.name) for run, summary in final.items() if summary]
        with redirect_stdout(StringIO()):  # the quick start has tables of its own
            compare.main([*finished, "--out", str(args.out / "comparison")])
    except RunFailed as error:
        parser.error(str(error), 1)
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    print(f"\n{format_search(search, best)}\n\n{format_final(final, best)}\n")
    print(f"{format_verdict(final)}\n")
    print(f"curves: {args.out / 'comparison.png'}")
    print(f"wall-clock time: {time.monotonic() - begin:.0f} s")


def check_flags(extra: Sequence[str], parser: Parser) -> None:
    """Refuse passed flags that a training would refuse or that this script sets."""
    lines = [Run(kind, RATES[0], SEEDS[0]).list_flags(Path()) for kind in KINDS]
    runner.refuse_flags(extra, lines, parser)
    script = build_script()
    script.parser.prog = parser.prog
    for own in lines:
        read_settings(script, [*FLAGS.split(), *extra, *own])


def compare_kinds(out: Path, extra: Sequence[str]) -> tuple[Results, dict[str, float], Results]:
    """Return the runs of the search, the best rate of each kind, and the runs at the best rates."""
    search = train_all([Run(kind, rate, SEEDS[0]) for rate in RATES for kind in KINDS], out, extra)
    best = {kind: choose_rate(search, kind) for kind in KINDS}
    repeats = [Run(kind, best[kind], seed) for seed in SEEDS[1:] for kind in KINDS]
    final = {run: search[run] for run in (Run(kind, best[kind], SEEDS[0]) for kind in KINDS)}
    final |= train_all(repeats, out, extra, len(search))
    return search, best, final


def train_all(runs: Sequence[Run], out: Path, extra: Sequence[str], finished: int = 0) -> Results:
    """Train runs two at a time; print a line for each. A failed run stops the others."""
    total = len(KINDS) * (len(RATES) + len(SEEDS) - 1)
    results, by_name = {}, {run.name: run for run in runs}

    def report(name: str, code: int | None) -> None:
        if code is None:
            return
        run = by_name[name]
        results[run] = read_result(code, out / name)
        setting = f"{run.kind}, learning rate {run.rate:g}, seed {run.seed}"
        accuracy = format_accuracy(results[run], "test top-1 {:.1f} %")
        print(f"{finished + len(results):2}/{total} {setting}: {accuracy}", flush=True)

    words = [sys.executable, runner.MAIN.file, *FLAGS.split(), *extra]
    lines = {run.name: [*words, *run.list_flags(out)] for run in runs}
    with stop_on_signal() as asked:
        slots = [None] * min(2, os.cpu_count() or 1)  # of no GPU in particular
        runner.run_all(lines, out, slots, report, asked)
        if number := asked():
            raise SystemExit(128 + number)
    return {run: results[run] for run in runs}


def read_result(code: int, folder: Path) -> dict[str, Any] | None:
    """Return the summary of a finished run, None for a diverged one; raise for a failed one."""
    if (folder / runner.DIVERGED_NAME).exists():
        return None
    if code:
        message = runner.read_last_line(folder) or "no message"
        raise RunFailed(f"exit code {code}, see {folder / runner.CONSOLE_NAME}: {message}")
    return runner.read_summary(folder)


def choose_rate(search: Results, kind: str) -> float:
    """Return the rate with the highest test top-1, the lowest such rate on a tie."""
    finished = [(run.rate, end) for run, end in search.items() if run.kind == kind and end]
    scores = {rate: end["test_top1"] for rate, end in finished}
    if not scores:
        raise RunFailed(f"{kind} diverged at every learning rate")
    return max(sorted(scores), key=scores.__getitem__)


def format_accuracy(summary: dict[str, Any] | None, form: str) -> str:
    """Return the test top-1 of a run in percent, or "diverged"."""
    return "diverged" if summary is None else form.format(summary["test_top1"])


def format_search(search: Results, best: dict[str, float]) -> str:
    """Return the table of the search, best rates marked, and a note on rates at an end."""
    some = next(summary for summary in search.values() if summary)
    title = (
        f"Search: one run of {some['steps']} steps of {some['batch_size']} images at each learning "
        f"rate (seed {SEEDS[0]})\nTest top-1 in percent; * best, trained with two more seeds"
    )
    rows = [["layers", *(f"{rate:g}" for rate in RATES)]]
    for kind in KINDS:
        runs = [search[Run(kind, rate, SEEDS[0])] for rate in RATES]
        marks = ["*" if rate == best[kind] else "" for rate in RATES]
        pairs = zip(runs, marks, strict=True)
        rows.append([kind, *(format_accuracy(run, "{:.1f}") + mark for run, mark in pairs)])
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
        names = ("train_loss", "test_top1", "train_seconds")
        loss, scores, seconds = ([run[name] for run in select(final, kind)] for name in names)
        spread = f"{min(scores):.1f} to {max(scores):.1f}"
        means = f"{mean(loss):.3f}", f"{mean(scores):.1f}", spread, f"{mean(seconds):.1f}"
        rows.append([kind, f"{best[kind]:g}", *means])
    return f"Best rates: means of {count_seeds(final)}\n{align(rows)}"


def count_seeds(final: Results) -> str:
    """Return the number of finished runs per kind, in words."""
    counts = {len(select(final, kind)) for kind in KINDS}
    return " or ".join(f"{count} seed{'s' * (count > 1)}" for count in sorted(counts))


def format_verdict(final: Results) -> str:
    """Return one sentence: which kind has the higher test top-1, or none if ranges overlap."""
    scores = {kind: [run["test_top1"] for run in select(final, kind)] for kind in KINDS}
    better, worse = sorted(KINDS, key=lambda kind: mean(scores[kind]), reverse=True)
    high, low = mean(scores[better]), mean(scores[worse])
    verdict = f"{better} is {high - low:.1f} points better than {worse}"
    if min(scores[better]) <= max(scores[worse]):
        verdict = f"{better} and {worse} do not differ by more than the seeds differ"
    steps = select(final, "BatchNorm")[0]["steps"]
    return (
        f"After {steps} steps, each at its own best learning rate, {verdict} "
        f"(test top-1 {high:.1f} % against {low:.1f} %, mean of {count_seeds(final)})."
    )


if __name__ == "__main__":
    main()
