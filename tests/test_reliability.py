"""Faults injected into the real program, in processes of its own: see docs/reliability.md."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from util.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LINE = "--arch simple_v2 --batch-size 4 --epochs 2 --dropout-rate .3 --print-freq 1 --lr .02"
# Runs main.py with `fault` in place.
FAULTY = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import main
from util.recorder import Recorder

whole_batch = Recorder.batch
{fault}
if __name__ == "__main__":
    main.main()
"""
KILLED = """
def batch(self, number, now):
    whole_batch(self, number, now)
    if self.done.step + number == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
Recorder.batch = batch
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of twelve pictures each to train on, four to test with: six steps an epoch."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name, low in (("dark", 0), ("bright", 100)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(low, low + 156, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def start(tmp_path, *argv, fault="", processes=1, **more):
    """main.py with `fault`, in a process of its own, or as many below torchrun."""
    path = tmp_path / "main.py"
    path.write_text(FAULTY.format(root=str(ROOT), fault=fault))
    launcher = TORCHRUN if processes > 1 else []
    words = [sys.executable, *launcher, path, *argv, "--use-gpu", "False", "--threads", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in words], cwd=tmp_path, **pipes, **more)


def finish(process):
    """Exit code, standard output and standard error."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def train(tmp_path, *argv, processes=1):
    """main.py as it is, here where one process is enough, which is faster."""
    if processes == 1:
        main.main([str(word) for word in (*argv, "--use-gpu", "False", "--threads", "1")])
    else:
        code, _, err = finish(start(tmp_path, *argv, processes=processes))
        assert code == 0, err


def flatten(value):
    """Nested values with every tensor written out in full."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: flatten(item) for key, item in value.items()}
    return [flatten(item) for item in value] if isinstance(value, (list, tuple)) else value


def rows(path):
    """A log without its last column, the seconds."""
    return [line.split("\t")[:-1] for line in path.read_text().splitlines()]


def curves(run_dir):
    """What TensorBoard shows: (step, value) by tag."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def assert_same_run(first, second):
    """Bit for bit, but for the seconds."""
    one, two = (load_checkpoint(path / "checkpoint.pth.tar", "cpu") for path in (first, second))
    for part in ("model", "optimizer", "rng", "epoch", "step", "best_top1"):
        assert repr(flatten(one[part])) == repr(flatten(two[part])), part
    for name in ("train.log", "test.log", "train_batch.log"):
        assert rows(first / name) == rows(second / name)
    assert curves(first) == curves(second)


@pytest.mark.parametrize(
    ("kind", "workers", "processes", "steps"),
    [
        ("--deconv True", 0, 1, (5, 6)),  # 6: before the test of the first epoch
        ("--batchnorm True", 2, 1, (9,)),
        pytest.param("--deconv True", 2, 2, (1, 3, 8), marks=pytest.mark.slow),
        pytest.param("--batchnorm True", 0, 2, (6, 11), marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_step_a_run_goes_on_bit_for_bit(
    pictures, tmp_path, kind, workers, processes, steps
):
    words = f"--dataset folder --data {pictures} {LINE} {kind} -j {workers}".split()
    train(tmp_path, *words, "--run-dir", tmp_path / "whole", processes=processes)
    again = [*words, "--run-dir", tmp_path / "parts", "--resume", "auto", "--checkpoint-steps", 2]
    for step in steps:
        first = start(tmp_path, *again, fault=KILLED.format(step=step), processes=processes)
        assert finish(first)[0] not in (0, 2)
    train(tmp_path, *again, processes=processes)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
