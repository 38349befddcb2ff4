"""What all recipes of this folder share: runs of main.py, each in its own folder, made once.

A recipe plans runs. One that has finished or diverged is not run again, one that was interrupted
goes on from its last checkpoint; a folder that is removed is run anew, unless its record
is in results/ and `--skip-recorded` says that this is enough: several machines can share a recipe.
What was run with other flags than the recipe's is refused, not taken for its own.
"""

from __future__ import annotations

import math
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from main import build_script
from scripts.paper.records import RESULTS, ROOT, Records, load, read_or_exit, read_record, top1_of
from util.checkpoint.store import BEST_NAME, PREVIOUS_NAME
from util.cli.inherited import MAY_CHANGE
from util.cli.parser import Parser, bounded_int, path_name
from util.tracking.provenance import RECORD_NAME
from util.training.recorder import DIVERGED_NAME
from util.training.signals import HANGUP

RUNS = ROOT / "runs" / "paper"
PICTURES = {"cifar10": 50_000, "fashion": 60_000}  # of training
CONSOLE_NAME = "console.txt"
SAVE_EVERY = 100  # optimizer steps
TO_MAKE = ("begun", "to do")  # states of a run


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        name: of its folder.
        pictures: a key of `PICTURES`.
        flags: of main.py, but those about data, folders and threads.
        steps: optimizer steps when it is finished.
        seconds: estimated, for one CPU thread.
    """

    name: str
    pictures: str
    flags: str
    steps: int
    seconds: float


# name -> test top-1 in percent; 0 where it has diverged, None where it was not tested yet.
Find = Callable[[str], float | None]


@dataclass(frozen=True)
class Recipe:
    """A result: the runs it needs, and what is made of them.

    Args:
        name: of the folder of its runs, and of its file in results/.
        title: one line.
        plan: plan(find) -> all runs but those that depend on results not yet found.
        page: page(records by name) -> its part of docs/results.md, see `paper_report.py`.
        draw: draw(records by name, path) -> its picture; None where it has none.
        after: after(folder of the runs, folder of CIFAR-10) -> command lines, run when all runs are
            finished.
    """

    name: str
    title: str
    plan: Callable[[Find], list[Run]]
    page: Callable[[dict[str, dict]], str]
    draw: Callable[[dict[str, dict], Path], None] | None = None
    after: Callable[[Path, str], list[list[str]]] = lambda folder, cifar10: []


def count_steps(pictures: str, batch_size: int) -> int:
    """Optimizer steps of an epoch."""
    return math.ceil(PICTURES[pictures] / batch_size)


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> None:
    """Make what a recipe needs. Exit: 1 where a run has failed, 128 + signal."""
    parser = make_parser(recipe)
    flags, more = parser.parse_known_args(argv)
    more = [word for word in more if word != "--"]
    folder = Path(flags.out) / recipe.name
    known = load(recipe.name, RESULTS) if flags.skip_recorded else {}
    if not (planned := list_runs(recipe, folder, flags.only, known, unknown=0.0)):
        parser.error(f"--only {flags.only} is in the name of no run; --dry-run shows them all")
    check_more(planned, flags, more, parser)
    if flags.cifar10 and not Path(flags.cifar10, "train").is_dir():
        parser.error(f"--cifar10 {flags.cifar10} has no folder train/ of pictures")
    if flags.dry_run:
        print(describe_plan(planned, folder, flags, more, known))
        return
    tried: set[str] = set()

    def list_left() -> list[Run]:
        return list_todo(recipe, folder, flags.only, known)

    while todo := [run for run in list_left() if run.name not in tried]:
        lines = {run.name: make_command(run, folder / run.name, flags, more) for run in todo}
        run_all(lines, folder, flags.jobs)
        tried |= lines.keys()
    if failed := [run.name for run in list_left()]:
        names = ", ".join(failed)
        raise SystemExit(f"{recipe.name}: not finished, see {CONSOLE_NAME} in {folder}: {names}")
    runs = list_runs(recipe, folder, flags.only, known)
    print(f"{recipe.name}: {len(runs)} runs, all made", flush=True)
    all_here = all(find_state(run, folder / run.name) == "finished" for run in runs)
    if all_here and flags.only is None:
        for line in recipe.after(folder, flags.cifar10 or flags.data):
            subprocess.run(line, cwd=ROOT, check=True)


def make_parser(recipe: Recipe) -> Parser:
    parser = Parser(f"{recipe.name}.py", f"{recipe.title}. Flags unknown here go to main.py.")
    add = parser.add_group("runs")
    text = "folder that holds CIFAR-10 as pictures, train/CLASS/* and test/CLASS/*"
    add("--cifar10", text, absolute, default_text="its binary files, in --data", metavar="DIR")
    text = "where Fashion-MNIST and binary CIFAR-10 lie or are downloaded to"
    add("--data", text, absolute, str(ROOT / "data"), "data", metavar="DIR")
    text = f"runs go to DIR/{recipe.name}"
    add("--out", text, absolute, str(RUNS), "runs/paper", metavar="DIR")
    add("--only", "only runs whose name contains TEXT", default_text="all", metavar="TEXT")
    add("--jobs", "runs at a time", bounded_int(1, 64), 1, metavar="N")
    add("--threads", "CPU threads of each", bounded_int(1, 1024), 1, metavar="N")
    text = "leave out runs whose figures are in results/ already, made here or elsewhere"
    add("--skip-recorded", text, action="store_true", default=False, default_text="")
    text = "say what would be run, and how long it would take"
    add("--dry-run", text, action="store_true", default=False, default_text="")
    return parser


def absolute(text: str) -> str:
    """A place as main.py finds it, which is started in the project's folder."""
    return str(Path(path_name(text)).resolve())


@cache
def find_parser() -> Parser:
    """That of main.py."""
    return build_script().parser


def check_more(runs: Sequence[Run], flags: Namespace, more: Sequence[str], parser: Parser) -> None:
    """Refuse flags that main.py does not know, and those that the recipe itself gives it."""
    own = {name for r in runs for name in find_parser().parse_typed(list_flags(r, Path(), flags))}
    for name in find_parser().parse_typed(more).keys() & own:
        parser.error(f"{find_parser().spelling[name]} is not passed on: this recipe sets it")


def check_made(run: Run, made: Mapping[str, Any], where: str) -> None:
    """Refuse a run that was made with other flags than the recipe says.

    Raises:
        SystemExit: names the run, the flag and both values.
    """
    asked = find_parser().parse_typed(shlex.split(run.flags))
    for name in (asked.keys() & made.keys()) - MAY_CHANGE:
        if made[name] != asked[name]:
            flag = find_parser().spelling[name]
            raise SystemExit(
                f"{where} was made with {flag} {made[name]}, the recipe's {run.name} has "
                f"{asked[name]}: it is another run, to be moved away"
            )


def gather(recipe: Recipe, folder: Path, known: Records) -> Records:
    """The records of the runs in `folder` that have come to their end.

    What was to be run may follow from `known` figures, of runs made elsewhere.
    """
    runs = list_runs(recipe, folder, None, known)
    names = [run.name for run in runs if find_state(run, folder / run.name) not in TO_MAKE]
    return {name: read_record(folder / name) for name in names}


def list_todo(recipe: Recipe, folder: Path, only: str | None, known: Records) -> list[Run]:
    """The runs that are neither over nor known, as far as they can be planned by now."""
    runs = list_runs(recipe, folder, only, known)
    return [run for run in runs if find_state(run, folder / run.name, known) in TO_MAKE]


def list_runs(
    recipe: Recipe, folder: Path, only: str | None, known: Records, unknown: float | None = None
) -> list[Run]:
    """Those planned, where results neither `known` nor found are taken to be `unknown`."""

    def find(name: str) -> float | None:
        if (folder / name / DIVERGED_NAME).exists():
            return 0.0
        if summary := read_summary(folder / name):
            return summary["test_top1"]
        return (top1_of(known[name]) or 0.0) if name in known else unknown

    return [run for run in recipe.plan(find) if only is None or only in run.name]


def find_state(run: Run, folder: Path, known: Records | None = None) -> str:
    """finished, diverged, recorded, begun or to do.

    Raises:
        SystemExit: what there is was made with other flags, or its files cannot be read.
    """
    if (folder / RECORD_NAME).exists():
        check_made(run, read_or_exit(folder / RECORD_NAME)["flags"], str(folder))
    if (folder / DIVERGED_NAME).exists():
        return "diverged"
    summary = read_summary(folder)
    if summary and summary["steps"] >= run.steps:
        return "finished"
    record = (known or {}).get(run.name)
    if record and ("diverged" in record or record["steps"] >= run.steps):
        check_made(run, record.get("flags", {}), f"its record in {RESULTS}")
        return "recorded"
    return "begun" if folder.exists() else "to do"


def read_summary(folder: Path) -> dict[str, Any] | None:
    path = folder / "summary.json"
    return read_or_exit(path) if path.exists() else None


def make_command(run: Run, folder: Path, flags: Namespace, more: Sequence[str]) -> list[str]:
    """The command line of a run, which goes on where it was begun."""
    return ["python", "main.py", *list_flags(run, folder, flags), *more]


def list_flags(run: Run, folder: Path, flags: Namespace) -> list[str]:
    """What the recipe itself gives to main.py."""
    if run.pictures == "cifar10" and flags.cifar10:
        data = ["--dataset", "folder", "--data", flags.cifar10, "--out", flags.out]
    else:
        data = ["--dataset", run.pictures, "--data", flags.data]
    save = ["--checkpoint-steps", str(min(SAVE_EVERY, run.steps)), "--resume", "auto"]
    where = ["--threads", str(flags.threads), "--run-dir", str(folder)]
    return [*shlex.split(run.flags), *data, *where, *save]


def describe_plan(
    runs: Sequence[Run], folder: Path, flags: Namespace, more: Sequence[str], known: Records
) -> str:
    """A line for each run, with its minutes and its command, and how long all will take.

    Rates that are still to be found are shown as the first of those to be tried.
    """
    lines, seconds = [], 0.0
    for run in runs:
        state = find_state(run, folder / run.name, known)
        seconds += run.seconds if state in TO_MAKE else 0
        command = shlex.join(make_command(run, folder / run.name, flags, more))
        lines.append(f"{state:8} {run.seconds / 60:5.0f} min  {command}")
    hours = seconds / 3600 / flags.jobs
    told = f"about {hours:.1f} hours to go, {flags.jobs} at a time, on an idle CPU core each"
    return "\n".join([*lines, told])


def run_all(lines: Mapping[str, Sequence[str]], folder: Path, jobs: int) -> None:
    """Run commands, by the names of their folders; one that fails does not stop the others.

    Raises:
        SystemExit: interrupted; the runs under way have saved what they have.
    """
    waiting, running = list(lines), {}
    numbers = filter(None, (signal.SIGTERM, signal.SIGINT, HANGUP))
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as SIGHUP is below nohup
            signal.signal(number, _leave)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running[name] = start(lines[name], folder / name)
            time.sleep(0.1)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                finish(running.pop(name).returncode, folder / name)
    except SystemExit:
        with suppress(OSError):  # the terminal may have gone
            print("stopped; the same command goes on", flush=True)
        raise
    finally:
        stop(running.values())
        for number, handler in before.items():
            signal.signal(number, handler)


def start(line: Sequence[str], folder: Path) -> subprocess.Popen:
    """Begin a run, or go on with it; what it says goes to its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{time.strftime('%H:%M')} {folder.name}", flush=True)
    with open(folder / CONSOLE_NAME, "a") as console:
        command = [sys.executable, *line[1:]]
        # In a session of its own, so that Ctrl-C comes once, from here.
        more = {"stderr": subprocess.STDOUT, "start_new_session": True}
        return subprocess.Popen(command, cwd=ROOT, stdout=console, **more)


def finish(code: int, folder: Path) -> None:
    """Say how a run has ended, and drop the checkpoints but the last."""
    summary = read_summary(folder)
    if (folder / DIVERGED_NAME).exists():
        told = "diverged"
    elif code or summary is None:
        said = (folder / CONSOLE_NAME).read_text(errors="replace").split("\n")
        last = next((line for line in reversed(said) if line.strip()), "")
        told = f"failed with code {code}: {last}"
    else:
        told = f"test top-1 {summary['test_top1']:.2f} %"
        for name in (PREVIOUS_NAME, BEST_NAME):
            (folder / name).unlink(missing_ok=True)
    print(f"{time.strftime('%H:%M')} {folder.name}: {told}", flush=True)


def stop(processes: Collection[subprocess.Popen]) -> None:
    """Let them save what they have, and wait for it."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
