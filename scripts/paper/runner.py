"""Run the trainings of a recipe: one run of main.py or of another script each, in its own folder.

A finished or diverged run is not repeated. An interrupted run continues from its last checkpoint.
With `--skip-recorded`, a run with a record in results/ is not repeated either, so several machines
can share a recipe. A folder that holds a run with other flags is refused.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from main import build_script
from scripts.paper.costs import GPU
from scripts.paper.records import (
    RESULTS,
    ROOT,
    Records,
    load,
    look_up_top1,
    read_or_exit,
    read_record,
    round_floats,
)
from util.checkpoint.store import BEST_NAME, PREVIOUS_NAME
from util.cli.inherited import MAY_CHANGE
from util.cli.parser import Parser, bounded_int, path_name
from util.cli.script import Script
from util.tracking.provenance import RECORD_NAME
from util.training.recorder import DIVERGED_NAME
from util.training.signals import StopRequest, stop_on_signal

RUNS = ROOT / "runs" / "paper"
TRAIN_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "fashion": 60_000}
CONSOLE_NAME = "console.txt"
CHECKPOINT_STEPS = 100
UNFINISHED = ("begun", "to do")  # states of a run


@dataclass(frozen=True)
class Program:
    """Script that makes a run, and its command line."""

    path: str  # within the project
    build_script: Callable[[], Script]

    @property
    def file(self) -> str:
        """Return the absolute path."""
        return str(ROOT / self.path)


MAIN = Program("main.py", build_script)


@dataclass(frozen=True)
class Run:
    """One training."""

    name: str  # of its folder
    dataset: str  # a key of TRAIN_IMAGES
    flags: str  # of the program, without those of data, folders and threads
    steps: int  # of the finished run
    seconds: float  # estimated duration on one CPU thread
    gpu_seconds: float = math.nan  # the same on one GPU, if known
    program: Program = MAIN


Lines = Mapping[str, Sequence[str]]  # run name -> command
Report = Callable[[str, int | None], None]  # run name, exit code after the end -> None
# Run name -> test top-1 in percent: 0 after divergence, None before the first test.
FindTop1 = Callable[[str], float | None]
Plan = Callable[[FindTop1], list[Run]]
AddFlag = Callable[..., None]  # of a group of `Parser`


@dataclass(frozen=True)
class Recipe:
    """The runs behind one table or plot, and the functions that show the results.

    Args:
        name: name of the recipe's folder of runs, and of its file in results/.
        title: one line.
        plan: plan(find_top1) -> runs, without those that depend on missing results.
        format: format(records) -> tables and values of results_template.md, by name.
        draw: draw(records, path) -> plot; None for a recipe without a plot.
        follow_up: follow_up(folder of the runs, folder of CIFAR-10) -> commands after all runs.
        add_flags: add_flags(add) adds the flags of the recipe itself; None for a recipe without.
        choose: choose(flags) -> plan of the runs that these flags select.
        read_more: read_more(folder of a run) -> what its record holds besides, by name.
    """

    name: str
    title: str
    plan: Plan
    format: Callable[[Records], dict[str, str]]
    draw: Callable[[Records, Path], None] | None = None
    follow_up: Callable[[Path, str], list[list[str]]] = lambda folder, cifar10: []
    add_flags: Callable[[AddFlag], None] | None = None
    choose: Callable[[Namespace], Plan] | None = None
    read_more: Callable[[Path], dict[str, Any]] = lambda folder: {}


def count_steps(dataset: str, batch_size: int) -> int:
    """Return the optimizer steps of one epoch."""
    return math.ceil(TRAIN_IMAGES[dataset] / batch_size)


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> None:
    """Run the trainings of a recipe; exit with 1 after a failed run, 128 + number by a signal."""
    parser = make_parser(recipe)
    flags, passed = parser.parse_known_args(argv)
    passed = [word for word in passed if word != "--"]
    if recipe.choose:
        recipe = replace(recipe, plan=recipe.choose(flags))
    folder = Path(flags.out) / recipe.name
    known = load(recipe.name, RESULTS) if flags.skip_recorded else {}
    planned = list_runs(recipe, folder, flags.only, known, unknown=0.0)
    check_command(planned, flags, passed, parser)
    if flags.dry_run:
        print(describe_plan(planned, folder, flags, passed, known))
        return
    tried: set[str] = set()
    while left := list_unfinished(recipe, folder, flags.only, known):
        if not (runs := [run for run in left if run.name not in tried]):
            names = ", ".join(run.name for run in left)
            raise SystemExit(
                f"{recipe.name}: not finished, see {CONSOLE_NAME} in {folder}: {names}"
            )
        lines = {run.name: make_command(run, folder / run.name, flags, passed) for run in runs}
        with stop_on_signal() as asked:
            run_all(lines, folder, list_slots(flags), partial(report_run, folder), asked)
            if number := asked():
                with suppress(OSError):  # the terminal may be closed
                    print("stopped; the same command continues", flush=True)
                raise SystemExit(128 + number)
        tried |= lines.keys()
    runs = list_runs(recipe, folder, flags.only, known)
    print(f"{recipe.name}: all {len(runs)} runs complete", flush=True)
    complete = all(find_state(run, folder / run.name) == "finished" for run in runs)
    if complete and not flags.only:
        for line in recipe.follow_up(folder, flags.cifar10 or flags.data):
            subprocess.run(line, cwd=ROOT, check=True)


def make_parser(recipe: Recipe) -> Parser:
    text = f"{recipe.title}. Other flags are passed on to the script of the runs."
    parser = Parser(f"{recipe.name}.py", text)
    if recipe.add_flags:
        recipe.add_flags(parser.add_group("table"))
    add = parser.add_group("runs")
    text = "folder of CIFAR-10 as image files, train/CLASS/* and test/CLASS/*"
    add("--cifar10", text, absolute, default_text="binary files in --data", metavar="DIR")
    text = "folder of Fashion-MNIST and of binary CIFAR, downloaded if missing"
    add("--data", text, absolute, str(ROOT / "data"), "data", metavar="DIR")
    text = f"write runs to DIR/{recipe.name}"
    add("--out", text, absolute, str(RUNS), "runs/paper", metavar="DIR")
    add("--only", "select runs whose name contains TEXT", None, "", "all", metavar="TEXT")
    text = "concurrent runs"
    add("--jobs", text, bounded_int(1, 64), None, "one, or one per GPU of --gpus", metavar="N")
    text = "give each run one of these GPUs, in turn; for example 0-7 or 0,2"
    add("--gpus", text, gpu_list, None, "every run sees all GPUs", metavar="LIST")
    add("--threads", "CPU threads per run", bounded_int(1, 1024), 1, metavar="N")
    text = "skip runs with a record in results/, of this or another machine"
    add("--skip-recorded", text, action="store_true")
    text = "list the runs and their estimated durations, run nothing"
    add("--dry-run", text, action="store_true")
    return parser


def gpu_list(text: str) -> list[int]:
    """Parse numbers and ranges of GPUs, as in 0-3,6."""
    found: list[int] = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())):
            raise argparse.ArgumentTypeError(f"expected numbers or ranges, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        found += range(first, last + 1)
        if last < first or len({*found}) < len(found):
            raise argparse.ArgumentTypeError(f"{text!r} has an empty range or a GPU twice")
    return found


def list_slots(flags: Namespace) -> list[int | None]:
    """Return the GPU of each concurrent run; None lets a run see all GPUs."""
    gpus = flags.gpus or [None]
    return [gpus[i % len(gpus)] for i in range(flags.jobs or len(gpus))]


def absolute(text: str) -> str:
    """Return an absolute path."""
    return str(Path(path_name(text)).resolve())


def check_command(
    runs: Sequence[Run], flags: Namespace, passed: Sequence[str], parser: Parser
) -> None:
    """Refuse a selection of no run, and passed flags that are unknown or that the recipe sets."""
    if not runs:
        parser.error(f"--only {flags.only} matches no run; --dry-run lists the runs")
    lines = [list_flags(run, Path(), flags) for run in runs]
    refuse_flags(passed, lines, parser, runs[0].program)
    try:
        [find_visible(gpu) for gpu in flags.gpus or []]
    except LookupError:
        visible = os.environ["CUDA_VISIBLE_DEVICES"]
        parser.error(f"--gpus {flags.gpus}: CUDA_VISIBLE_DEVICES={visible} has fewer GPUs")
    if flags.cifar10 and not Path(flags.cifar10, "train").is_dir():
        parser.error(f"--cifar10 {flags.cifar10} has no folder train/ of images")


def refuse_flags(
    passed: Sequence[str],
    lines: Sequence[Sequence[str]],
    parser: Parser,
    program: Program = MAIN,
) -> None:
    """Refuse passed flags that the program does not know or that one of the lines sets."""
    known = program.build_script().parser
    known.prog = parser.prog
    own = {name for line in lines for name in known.parse_typed(line)}
    for name in known.parse_typed(passed).keys() & own:
        parser.error(f"{known.spelling[name]} is not passed on: this script sets it")


def check_flags(run: Run, recorded: Mapping[str, Any], source: str) -> None:
    """Refuse recorded flags that differ from the recipe's.

    Raises:
        SystemExit: names the run, the flag and both values.
    """
    parser = run.program.build_script().parser
    expected = parser.parse_typed(shlex.split(run.flags))
    for name in (expected.keys() & recorded.keys()) - MAY_CHANGE:
        if recorded[name] != expected[name]:
            raise SystemExit(
                f"{source} was made with {parser.spelling[name]} {recorded[name]}, the recipe's "
                f"{run.name} has {expected[name]}: move this other run away"
            )


def gather(recipe: Recipe, folder: Path, known: Records) -> Records:
    """Return the records of the finished and diverged runs in `folder`.

    The plan may depend on the results of `known` runs, made elsewhere.
    """
    runs = list_runs(recipe, folder, "", known)
    names = [run.name for run in runs if find_state(run, folder / run.name) not in UNFINISHED]
    return {
        name: round_floats(read_record(folder / name) | recipe.read_more(folder / name))
        for name in names
    }


def list_unfinished(recipe: Recipe, folder: Path, only: str, known: Records) -> list[Run]:
    """Return the planned runs that are neither over nor recorded in `known`."""
    runs = list_runs(recipe, folder, only, known)
    return [run for run in runs if find_state(run, folder / run.name, known) in UNFINISHED]


def list_runs(
    recipe: Recipe, folder: Path, only: str, known: Records, unknown: float | None = None
) -> list[Run]:
    """Return the planned runs, with missing results taken as `unknown`."""

    def find_top1(name: str) -> float | None:
        if (folder / name / DIVERGED_NAME).exists():
            return 0.0
        if summary := read_summary(folder / name):
            return summary["test_top1"]
        return look_up_top1(known, name, unknown)

    return [run for run in recipe.plan(find_top1) if only in run.name]


def find_state(run: Run, folder: Path, known: Records | None = None) -> str:
    """Return one of finished, diverged, recorded, begun, to do.

    Raises:
        SystemExit: the run was made with other flags, or its files cannot be read.
    """
    if (folder / RECORD_NAME).exists():
        check_flags(run, read_or_exit(folder / RECORD_NAME)["flags"], str(folder))
    if (folder / DIVERGED_NAME).exists():
        return "diverged"
    summary = read_summary(folder)
    if summary and summary["steps"] >= run.steps:
        return "finished"
    record = (known or {}).get(run.name)
    if record and ("diverged" in record or record["steps"] >= run.steps):
        check_flags(run, record.get("flags", {}), f"the record in {RESULTS}")
        return "recorded"
    return "begun" if folder.exists() else "to do"


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a run, None before its first test."""
    path = folder / "summary.json"
    return read_or_exit(path) if path.exists() else None


def make_command(run: Run, folder: Path, flags: Namespace, passed: Sequence[str]) -> list[str]:
    """Return the command line that starts or continues a run."""
    return [sys.executable, run.program.file, *list_flags(run, folder, flags), *passed]


def list_flags(run: Run, folder: Path, flags: Namespace) -> list[str]:
    """Return the flags that the recipe sets."""
    if run.dataset == "cifar10" and flags.cifar10:
        data = ["--dataset", "folder", "--data", flags.cifar10, "--out", flags.out]
    else:
        data = ["--dataset", run.dataset, "--data", flags.data]
    # An epoch takes minutes on a CPU. On a GPU, the checkpoint after each epoch suffices.
    save = [] if flags.gpus else ["--checkpoint-steps", str(min(CHECKPOINT_STEPS, run.steps))]
    machine = ["--threads", str(flags.threads), "--run-dir", str(folder)]
    return [*shlex.split(run.flags), *data, *machine, *save, "--resume", "auto"]


def describe_plan(
    runs: Sequence[Run], folder: Path, flags: Namespace, passed: Sequence[str], known: Records
) -> str:
    """Return a line per run, with state, minutes and command, and the total duration.

    A learning rate that the search has not found yet is shown as the first candidate.
    """
    lines, slots, left = [], list_slots(flags), []
    for run in runs:
        state = find_state(run, folder / run.name, known)
        seconds = run.gpu_seconds if flags.gpus else run.seconds
        left += [seconds] if state in UNFINISHED else []
        words = shlex.join([*list_flags(run, folder / run.name, flags), *passed])
        minutes = "?" if math.isnan(seconds) else f"{seconds / 60:.0f}"
        lines.append(f"{state:8} {minutes:>5} min  python {run.program.path} {words}")
    known_seconds = [value for value in left if not math.isnan(value)]
    # No number of slots ends before the longest run.
    hours = max(sum(known_seconds) / len(slots), *known_seconds, 0.0) / 3600
    where = f"an {GPU} each" if flags.gpus else "an idle CPU core each"
    lines.append(f"about {hours:.1f} hours to go, {len(slots)} at a time, on {where}")
    if unknown := len(left) - len(known_seconds):
        lines[-1] += f", without {unknown} runs of unknown duration"
    return "\n".join(lines)


def run_all(
    lines: Lines, folder: Path, slots: Sequence[int | None], report: Report, asked: StopRequest
) -> None:
    """Run commands in the folders of their names, and report the start and the end of each.

    `slots` holds the GPU of each concurrent run. A stop request or an error terminates the active
    runs, which save a checkpoint first.
    """
    waiting, free = list(lines), list(slots)
    running: dict[str, tuple[subprocess.Popen[bytes], int | None]] = {}
    try:
        while (waiting or running) and not asked():
            while waiting and free:
                name, gpu = waiting.pop(0), free.pop(0)
                running[name] = start(lines[name], folder / name, gpu), gpu
                report(name, None)
            time.sleep(0.05)
            for name in [name for name, (run, _) in running.items() if run.poll() is not None]:
                run, gpu = running.pop(name)
                free.append(gpu)
                report(name, run.returncode)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()  # until it has saved


def start(line: Sequence[str], folder: Path, gpu: int | None) -> subprocess.Popen[bytes]:
    """Start or continue a run on a GPU; append its output to the console file in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    env = None if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": find_visible(gpu)}
    with open(folder / CONSOLE_NAME, "ab") as console:
        streams = {"stdin": subprocess.DEVNULL, "stdout": console, "stderr": subprocess.STDOUT}
        # A new session keeps Ctrl-C from the run; `run_all` passes the signal on once.
        return subprocess.Popen(line, **streams, env=env, start_new_session=True)


def find_visible(gpu: int) -> str:
    """Return the GPU's entry in CUDA_VISIBLE_DEVICES, or its number if the variable is not set.

    Raises:
        LookupError: the variable has no such entry.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(gpu) if visible is None else visible.split(",")[gpu].strip()


def report_run(folder: Path, name: str, code: int | None) -> None:
    """Print the start or the outcome of a run; keep only its last checkpoint."""
    summary, outcome = read_summary(folder / name), ""
    if code is not None and (folder / name / DIVERGED_NAME).exists():
        outcome = ": diverged"
    elif code or (code == 0 and summary is None):
        outcome = f": failed with code {code}: {read_last_line(folder / name)}"
    elif code == 0:
        outcome = f": test top-1 {summary['test_top1']:.2f} %"
        for checkpoint in (PREVIOUS_NAME, BEST_NAME):
            (folder / name / checkpoint).unlink(missing_ok=True)
    print(f"{time.strftime('%H:%M')} {name}{outcome}", flush=True)


def read_last_line(folder: Path) -> str:
    """Return the last line of a run's output that is not empty."""
    return (folder / CONSOLE_NAME).read_text(errors="replace").strip().rpartition("\n")[2]
