"""Run all measurements that need a GPU, within a time limit; write results/gpu.json.

    python scripts/bench/gpu.py --cifar10 DIR --minutes 10      the most telling parts first
    python scripts/bench/gpu.py --show                          the Markdown rows of the results

A part that has finished is not repeated. The next call continues with the others: trainings
continue from their last checkpoint, benchmarks and tests begin again. The parts use the first
visible GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.bench.steps import describe_environment
from scripts.paper import table1
from scripts.paper.records import METRICS, RESULTS, ROOT
from scripts.paper.tables import format_table
from util.cli.parser import Parser, bounded_float, path_name
from util.files import atomic_write
from util.tracking.logger import read_json

GRACE_SECONDS = 20.0  # for a training that saves after SIGTERM
TESTS = ["-m", "pytest", "-q", "-m", "gpu"]
STEPS = ["scripts/bench/steps.py", "--device", "cuda", "--no-memory"]
SMALL = ["--arch", "vgg11", "resnet18", "--mode", "5", "3"]
LARGE = ["--arch", "resnet50d", "--image-size", "224", "--classes", "1000", "--batch-size"]
EPOCH = "--arch vgg11 --batch-size 128 --epochs 1 --wd 5e-4 --gpu 0 --save-plot False"
KINDS = {"bn": "--deconv False --lr 0.01", "deconv": "--deconv True --lr 0.1"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]


@dataclass(frozen=True)
class Part:
    """One measurement.

    Args:
        name: key in the results.
        command: arguments of Python, with the path of the result.
        read: read(path) -> result of the finished command.
    """

    name: str
    command: Sequence[str]
    path: Path
    read: Callable[[Path], Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    flags = parser.parse_args(argv)
    file = Path(flags.json)
    results = read_json(file) if file.exists() else {}
    if flags.show:
        print(format_results(results))
        return
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device: run this script on a machine with a GPU")
    if not flags.cifar10 or not Path(flags.cifar10, "train").is_dir():
        parser.error(f"--cifar10 {flags.cifar10} has no folder train/ of images")
    results["environment"] = describe_environment(torch.device("cuda"))
    run_parts(list_parts(flags), results, file, 60 * flags.minutes)


def make_parser() -> Parser:
    parser = Parser("gpu.py", __doc__.splitlines()[0])
    add = parser.add_group("measurement")
    text = "folder of CIFAR-10 as image files, train/CLASS/* and test/CLASS/*"
    add("--cifar10", text, path_name, metavar="DIR")
    add("--minutes", "stop after this time", bounded_float(above=0), 10.0, metavar="N")
    text = "runs and raw results"
    add("--out", text, path_name, str(ROOT / "runs" / "gpu"), "runs/gpu", metavar="DIR")
    text = "results of all parts"
    add("--json", text, path_name, str(RESULTS / "gpu.json"), "results/gpu.json", metavar="FILE")
    add("--show", "print the results as Markdown, run nothing", action="store_true")
    return parser


def list_parts(flags: Namespace) -> list[Part]:
    """Return all parts, the most telling first."""
    out = Path(flags.out).resolve()
    data = ["--dataset", "folder", "--data", str(Path(flags.cifar10).resolve())]

    def test(name: str, select: str) -> Part:
        path = out / f"{name}.xml"
        return Part(name, [*TESTS, "-k", select, f"--junitxml={path}"], path, read_tests)

    def measure(name: str, *words: str) -> Part:
        path = out / f"{name}.json"
        return Part(name, [*STEPS, *words, "--json", str(path)], path, read_steps)

    def train(name: str, kind: str, *launcher: str) -> Part:
        words = [*EPOCH.split(), *KINDS[kind].split(), *data, "--resume", "auto"]
        path = out / name
        return Part(name, [*launcher, "main.py", *words, "--run-dir", str(path)], path, read_run)

    def train_long(arch: str, kind: str) -> Part:
        (name,) = table1.name_runs(arch, kind, 20)
        words = ["--cifar10", flags.cifar10, "--epochs", "20", "--only", name, "--gpus", "0"]
        words += ["--out", str(out)]
        path = out / table1.RECIPE.name / name
        return Part(name, ["scripts/paper/table1.py", *words], path, read_run)

    return [
        test("tests", "not compile"),
        measure("small", *SMALL, "--rounds", "31"),
        measure("small, no graphs", *SMALL, "--rounds", "11", "--cuda-graphs", "False"),
        *(train(f"vgg11-{kind}", kind) for kind in KINDS),
        *(train(f"vgg11-{kind}, torchrun", kind, *TORCHRUN) for kind in KINDS),
        measure("large", *LARGE, "256", "--rounds", "7"),
        *(train_long(arch, kind) for arch in ("vgg16", "resnet18") for kind in ("deconv", "bn")),
        test("tests that compile", "compile"),
    ]


def run_parts(parts: Sequence[Part], results: dict[str, Any], file: Path, seconds: float) -> None:
    """Run the parts that have not finished until the time is over; save after each part."""
    end = time.monotonic() + seconds
    for part in parts:
        start, old = time.monotonic(), results.get(part.name, {})
        limit = end - start - GRACE_SECONDS
        if old.get("state") == "finished" or limit <= 0:
            continue
        print(f"{part.name} ...", end=" ", flush=True)
        state, value = run_part(part, limit)
        spent = round(time.monotonic() - start + old.get("seconds", 0), 1)
        results[part.name] = {"state": state, "seconds": spent, "result": value}
        print(f"{state} after {spent:.0f} s", flush=True)
        with atomic_write(file) as stream:
            stream.write(json.dumps(results, indent=1).encode() + b"\n")
    names = [part.name for part in parts if results.get(part.name, {}).get("state") != "finished"]
    print(
        f"to do: {', '.join(names)}; the same command continues" if names else "all parts finished"
    )


def run_part(part: Part, seconds: float) -> tuple[str, Any]:
    """Run a part for at most `seconds`; return its state, and its result or last output."""
    part.path.parent.mkdir(parents=True, exist_ok=True)
    log = part.path.parent / f"{part.name}.txt"
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "interrupted", None
        finally:  # also after Ctrl-C
            stop(process)
    if code == 0:
        return "finished", part.read(part.path)
    return "failed", log.read_text(errors="replace").strip().splitlines()[-3:]


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a running process to save and end; kill it after the grace period."""
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def read_tests(path: Path) -> dict[str, int]:
    """Return the numbers of tests, failures and skipped tests of a JUnit report."""
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in xml.parse(path).getroot().iter("testsuite"):
        total = {key: value + int(suite.get(key, 0)) for key, value in total.items()}
    return total


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Return the cases of `steps.py`, without the times of single steps."""
    rows = []
    for row in read_json(path)["rows"]:
        train = {key: row["train"][key] for key in ("base_seconds", "deconv_seconds", "ratio")}
        case = {key: row[key] for key in ("arch", "mode", "block", "batch_size", "dtype")}
        rows.append({**case, **train, "quartiles": row["train"]["quartiles"]})
    return rows


def read_run(path: Path) -> dict[str, Any]:
    """Return the metrics of a finished training."""
    summary = read_json(path / "summary.json")
    return {key: summary.get(key) for key in (*METRICS, "images_per_second", "device")}


def format_results(results: dict[str, Any]) -> str:
    """Return the finished parts as Markdown tables."""
    parts = {name: part for name, part in results.items() if name != "environment"}
    done = {name: part["result"] for name, part in parts.items() if part["state"] == "finished"}
    steps, runs, tests = [], [], []
    for name, result in done.items():
        if isinstance(result, list):
            steps += [[name, *format_case(row)] for row in result]
        elif "test_top1" in result:
            speed = f"{result['images_per_second']:,.0f}"
            runs.append([name, result["steps"], f"{result['test_top1']:.2f}", speed])
        else:
            tests.append([name, *result.values()])
    header = ["measurement", "network", "images", "mode", "BatchNorm (ms)", "deconvolution (ms)"]
    sections = [
        format_table([*header, "ratio [quartiles]"], steps),
        format_table(["training", "steps", "test top-1 (%)", "images per second"], runs),
        format_table(["tests", "run", "failures", "errors", "skipped"], tests),
        format_table(
            ["part", "state", "seconds"],
            [[name, part["state"], part["seconds"]] for name, part in parts.items()],
        ),
    ]
    return "\n".join([", ".join(results.get("environment", {}).values()), "", *sections])


def format_case(row: dict[str, Any]) -> list[str]:
    times = [f"{1000 * row[f'{name}_seconds']:.1f}" for name in ("base", "deconv")]
    ratio = "{:.2f} [{:.2f}, {:.2f}]".format(row["ratio"], *row["quartiles"])
    return [row["arch"], str(row["batch_size"]), str(row["mode"]), *times, ratio]


if __name__ == "__main__":
    main()
