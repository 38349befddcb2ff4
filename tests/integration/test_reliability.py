"""Faults injected into the real program, in processes of its own: see docs/reliability.md."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from util.checkpoint.store import load_checkpoint
from util.data.sampler import EpochBatches
from util.training.accelerator import Accelerator

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LINE = "--arch simple_v2 --batch-size 4 --epochs 2 --dropout-rate .3 --print-freq 1 --lr .02"
ALONE = ["--use-gpu", "False", "--threads", "1"]
# Comes before main.py where a fault is wanted.
FAULTY = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import torch
import main
from util.training.recorder import Recorder

whole_batch = Recorder.batch
{fault}
if __name__ == "__main__":
    main.main()
"""
# What the first process does once it has recorded a step.
AFTER_STEP = """
def batch(self, number, now):
    whole_batch(self, number, now)
    step, model = self.state.progress.step + number, self.state.model
    {act}
Recorder.batch = batch
"""
KILL = "if step == {step}: os.kill(os.getpid(), signal.{name})"
# From outside, and to those that load images too, as torchrun and Slurm do.
ASK_ALL = """
    import multiprocessing, subprocess
    if step == {step}:
        pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        subprocess.run(["kill", "-s", "{name}".removeprefix("SIG"), *map(str, pids)], check=True)
"""


class Ended(NamedTuple):
    """How a process ended: exit code, or minus the signal that killed it, and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of twelve images each to train on, four to test with: six steps an epoch."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name, low in (("dark", 0), ("bright", 100)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(low, low + 156, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def run(tmp_path, *argv, act="", processes=1):
    """main.py with a fault in a process of its own, or two below torchrun, from start to end."""
    fault = AFTER_STEP.format(act=act) if act else ""
    argv = [str(word) for word in (*argv, *ALONE)]
    if processes == 1:
        with spawn(tmp_path, argv, fault) as process:
            return process.wait()
    path = tmp_path / "main.py"
    path.write_text(FAULTY.format(root=str(ROOT), fault=fault))
    words = [sys.executable, *TORCHRUN, path, *argv]
    end = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    return Ended(end.returncode, end.stdout, end.stderr)


@contextmanager
def spawn(tmp_path, argv, fault=""):
    """A child of this process, which has imported everything already."""
    child = Child(tmp_path)
    if child.pid == 0:
        child.live(argv, fault)
    try:
        yield child
    finally:
        child.end()


class Child:
    def __init__(self, folder):
        self.files = [folder / "stdout", folder / "stderr"]
        sys.stdout.flush()
        self.pid = os.fork()

    def live(self, argv, fault):
        """Only in the child, which never returns."""
        code = 1
        try:
            for number, file in enumerate(self.files, start=1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
            sys.argv = ["main.py", *argv]
            exec(FAULTY.format(root=str(ROOT), fault=fault), {"__name__": "__main__"})
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code if isinstance(code, int) else 1)

    def end(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self):
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return Ended(os.waitstatus_to_exitcode(status), *(f.read_text() for f in self.files))


def train(tmp_path, *argv, processes=1):
    """main.py without a fault; here, where one process is enough."""
    if processes == 1:
        main.main([str(word) for word in (*argv, *ALONE)])
    else:
        end = run(tmp_path, *argv, processes=processes)
        assert end.code == 0, end.err


def flatten(value):
    """Nested values with every tensor written out in full."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: flatten(item) for key, item in value.items()}
    return [flatten(item) for item in value] if isinstance(value, (list, tuple)) else value


def rows(path):
    """A log without the column of the seconds."""
    table = [line.split("\t") for line in path.read_text().splitlines()]
    seconds = table[0].index("seconds")
    return [row[:seconds] + row[seconds + 1 :] for row in table]


def curves(run_dir):
    """Return the points that TensorBoard shows, without times: (step, value) by tag."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("time/")]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def assert_same_run(first, second):
    """Bit for bit, but for the seconds."""
    one, two = (load_checkpoint(path / "checkpoint.pth.tar") for path in (first, second))
    for part in ("model", "ema", "optimizer", "rng", "epoch", "step", "best_top1"):
        assert repr(flatten(one.get(part))) == repr(flatten(two.get(part))), part
    for name in ("train.log", "test.log", "train_batch.log"):
        assert rows(first / name) == rows(second / name)
    assert curves(first) == curves(second)


@pytest.mark.parametrize(
    ("kind", "workers", "processes", "steps"),
    [
        # 6: before the test of the first epoch. Steps 0 and 10 estimate, the others are frozen.
        ("--deconv True --freeze True --freeze-iter 1", 0, 1, (5, 6)),
        ("--batchnorm True --optimizer Muon --accum-steps 2 --ema .5", 2, 1, (9,)),
        pytest.param(
            *("--deconv True --freeze True --freeze-iter 1 --norm-type layernorm", 2, 2),
            *((1, 3, 8),),
            marks=pytest.mark.slow,
        ),
        pytest.param("--batchnorm True --ema .5", 0, 2, (6, 11), marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_step_a_run_goes_on_bit_for_bit(
    images, tmp_path, kind, workers, processes, steps
):
    words = f"--dataset folder --data {images} {LINE} {kind} -j {workers}".split()
    train(tmp_path, *words, "--run-dir", tmp_path / "whole", processes=processes)
    again = [*words, "--run-dir", tmp_path / "parts", "--resume", "auto", "--checkpoint-steps", 2]
    for step in steps:
        act = KILL.format(step=step, name="SIGKILL")
        assert run(tmp_path, *again, act=act, processes=processes).code not in (0, 2)
    train(tmp_path, *again, processes=processes)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("name", "code", "step", "processes", "workers"),
    [
        ("SIGTERM", 143, 4, 1, 1),
        ("SIGHUP", 129, 9, 1, 0),
        ("SIGINT", 130, 6, 1, 0),  # before the test of the first epoch, which is given up
        pytest.param("SIGTERM", 1, 3, 2, 2, marks=pytest.mark.slow),  # 1: torchrun's
    ],
)
def test_a_signal_saves_the_step_under_way_and_a_run_goes_on_bit_for_bit(
    images, tmp_path, name, code, step, processes, workers
):
    words = f"--dataset folder --data {images} {LINE} --deconv True -j {workers}".split()
    parts = [*words, "--run-dir", tmp_path / "parts", "--resume", "auto"]
    end = run(tmp_path, *parts, act=ASK_ALL.format(step=step, name=name), processes=processes)
    checkpoint = tmp_path / "parts" / "checkpoint.pth.tar"
    assert end.code == code, end.err
    again = f"--resume {checkpoint} --data {images}"
    assert end.err.count(f"interrupted: continue with {again}\n") == 1
    stopped = load_checkpoint(checkpoint)["step"]
    assert stopped == 6 if step == 6 else stopped in (step, step + 1)
    train(tmp_path, *parts, processes=processes)
    train(tmp_path, *words, "--run-dir", tmp_path / "whole", processes=processes)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_from_outside_ends_a_run_within_ten_seconds(tmp_path):
    words = "--dataset digits --arch simple_v2 --batch-size 32 --print-freq 1 --save-plot False"
    argv = [*words.split(), "--run-dir", str(tmp_path / "run"), *ALONE]
    log = tmp_path / "run" / "train_batch.log"
    with spawn(tmp_path, argv) as process:
        while not (log.exists() and len(log.read_text().splitlines()) > 3):
            assert os.waitpid(process.pid, os.WNOHANG) == (0, 0)
            time.sleep(0.05)
        sent = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        end = process.wait()
    assert time.monotonic() - sent < 10
    assert end.code == 143, end.err
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["step"] >= 3


def test_of_runs_started_in_one_folder_at_once_one_writes(images, tmp_path):
    words = f"--dataset folder --data {images} {LINE} --run-dir {tmp_path / 'run'}".split()
    again = [*words, *ALONE, "--resume", "auto"]
    places = [tmp_path / name for name in ("first", "second")]
    for place in places:
        place.mkdir()
    waits = AFTER_STEP.format(act="if step == 2: time.sleep(60)")  # longer than the other takes
    with spawn(places[0], again, waits) as one, spawn(places[1], again, waits) as other:
        pid, status = os.waitpid(-1, 0)
        lost, left = (one, other) if pid == one.pid else (other, one)
        lost.pid = 0
        assert os.waitstatus_to_exitcode(status) == 2
        (told,) = lost.files[1].read_text().splitlines()
        assert f"{tmp_path / 'run'}: process {left.pid} on " in told
    train(tmp_path, *again)  # the owner is killed, and the folder free at once
    train(tmp_path, *words, "--run-dir", tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


BAD_WEIGHT = "if step == 4: model.get_parameter('features.4.weight').data.fill_(float('inf'))"
BAD_GRADIENT = (
    "if step == 4: model.get_parameter('features.4.weight').register_hook(lambda g: g * torch.inf)"
)


@pytest.mark.parametrize(
    ("act", "processes", "reason", "first"),
    [
        (BAD_WEIGHT, 1, "the loss is nan", "the output of features.4 (FastDeconv)"),
        (BAD_GRADIENT, 1, "the largest gradient is", "the gradient of features.4.weight"),
        pytest.param(
            *(BAD_WEIGHT, 2, "the loss is nan", "the output of features.4 (FastDeconv)"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_numbers_gone_bad_stop_the_run_before_the_update(
    images, tmp_path, act, processes, reason, first
):
    words = f"--dataset folder --data {images} {LINE} --deconv True --checkpoint-steps 2".split()
    end = run(tmp_path, *words, "--run-dir", tmp_path / "run", act=act, processes=processes)
    assert end.code == 1, end.err
    assert f"training diverged at epoch 1/2, batch 5: {reason}" in end.err
    assert f"(step 5), first in {first}, with training images" in end.err
    order = EpochBatches(24, 4)
    order.set_epoch(1)
    report = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert (report["step"], report["first"]) == (5, first)
    assert report["images"] == order.images(4)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["step"] == 4


def test_results_read_a_step_late_change_no_bit_of_a_run(images, tmp_path, monkeypatch):
    words = f"--dataset folder --data {images} {LINE} --deconv True --ema .5 --epochs 1".split()
    train(tmp_path, *words, "--run-dir", tmp_path / "now")
    monkeypatch.setattr(Accelerator, "reads_late", True)  # as on a GPU
    train(tmp_path, *words, "--run-dir", tmp_path / "late", "--checkpoint-steps", 5)
    assert_same_run(tmp_path / "now", tmp_path / "late")


@pytest.mark.parametrize("every", [1, 2])
def test_a_bad_batch_that_is_read_a_step_late_reaches_no_checkpoint(
    images, tmp_path, monkeypatch, capsys, every
):
    """The batch of step 5; the check comes before a checkpoint, or in the forward of step 6."""
    steps, move = itertools.count(1), Accelerator.batch_to_device

    def spoil(self, images, targets):
        return move(self, images * (torch.nan if next(steps) == 5 else 1), targets)

    monkeypatch.setattr(Accelerator, "reads_late", True)
    monkeypatch.setattr(Accelerator, "batch_to_device", spoil)
    words = f"--dataset folder --data {images} {LINE} --lr-scheduler step".split()
    words += ["--checkpoint-steps", every]
    with pytest.raises(SystemExit):
        train(tmp_path, *words, "--run-dir", tmp_path / "run")
    assert "batch 5: the loss is nan (step 5), first in the output" in capsys.readouterr().err
    assert next(steps) == (6 if every == 1 else 7)
    order = EpochBatches(24, 4)
    order.set_epoch(1)
    report = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert (report["step"], report["images"]) == (5, order.images(4))
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")
    train(tmp_path, *words, "--max-steps", 4, "--run-dir", tmp_path / "good")
    good = load_checkpoint(tmp_path / "good" / "checkpoint.pth.tar")
    assert saved["step"] == good["step"] == 4
    assert repr(flatten(saved["model"])) == repr(flatten(good["model"]))


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(images, tmp_path, capsys):
    words = f"--dataset folder --data {images} {LINE}".split()
    parts = [*words, "--run-dir", tmp_path / "parts", "--resume", "auto", "--checkpoint-steps", 2]
    run(tmp_path, *parts, act=KILL.format(step=5, name="SIGKILL"))
    latest = tmp_path / "parts" / "checkpoint.pth.tar"
    latest.write_bytes(latest.read_bytes()[:-1000])
    with pytest.raises(SystemExit) as refused:
        train(tmp_path, "--resume", latest)
    assert refused.value.code == 2
    assert f"main.py: error: {latest}: damaged" in capsys.readouterr().err
    train(tmp_path, *parts)
    said = capsys.readouterr().out
    previous = latest.with_name("checkpoint_previous.pth.tar")
    assert f"warning: {latest}: damaged" in said and f"resuming from {previous}, step 2" in said
    train(tmp_path, *words, "--run-dir", tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_where_every_checkpoint_is_damaged_nothing_is_begun_anew(tmp_path, capsys):
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        (tmp_path / name).write_bytes(b"damaged")
    (tmp_path / "checkpoint_1.pth.tar").mkdir()
    (tmp_path / "checkpoint_previous.pth.tar").symlink_to(tmp_path / "a disk that is not there")
    with pytest.raises(SystemExit) as refused:
        train(tmp_path, "--dataset", "digits", "--run-dir", tmp_path, "--resume", "auto")
    assert refused.value.code == 2
    told = capsys.readouterr().err
    assert told.count("damaged, or not a checkpoint") == 2 and told.count("\n") == 1
    assert "checkpoint_1.pth.tar: Is a directory" in told
    assert "checkpoint_previous.pth.tar: No such file or directory" in told
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == b"damaged"
    assert len(list(tmp_path.iterdir())) == 4


def test_a_link_to_a_checkpoint_that_is_not_there_now_is_not_begun_anew(tmp_path, capsys):
    (tmp_path / "checkpoint.pth.tar").symlink_to(tmp_path / "a disk that is not there")
    with pytest.raises(SystemExit):
        train(tmp_path, "--dataset", "digits", "--run-dir", tmp_path, "--resume", "auto")
    assert "checkpoint.pth.tar: No such file or directory" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


LOSE_WORKER = """
    import multiprocessing
    if step == 4:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
"""


def test_a_killed_loading_process_costs_no_step(images, tmp_path):
    words = f"--dataset folder --data {images} {LINE} --deconv True -j 1".split()
    end = run(tmp_path, *words, "--run-dir", tmp_path / "run", act=LOSE_WORKER)
    assert end.code == 2, end
    (told,) = end.err.splitlines()
    assert "a process that loads images was killed" in told
    assert "/dev/shm" in told and "-j 0" in told
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["step"] >= 4
    train(tmp_path, "--resume", tmp_path / "run", "--data", images, "-j", 0)
    train(tmp_path, *words, "--run-dir", tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


LIMIT = """
    import resource
    limits = {limits}
    if step in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[step], resource.RLIM_INFINITY))
"""


def test_no_space_for_a_while_costs_checkpoints_but_not_the_run(images, tmp_path):
    words = f"--dataset folder --data {images} {LINE} --checkpoint-steps 2".split()
    act = LIMIT.format(limits={3: 100_000, 9: -1})  # from the third step to the ninth
    end = run(tmp_path, *words, "--run-dir", tmp_path / "run", act=act)
    assert (end.code, end.err) == (0, "")
    fault = (
        f"{tmp_path / 'run' / 'checkpoint.pth.tar'}: File too large (100,000 bytes were written)"
    )
    assert end.out.count(f"warning: {fault}; training goes on") == 1
    assert not list((tmp_path / "run").glob(".*.tmp"))
    train(tmp_path, *words, "--run-dir", tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


MOUNTED = """
    import ctypes, shutil, subprocess
    folder, size, how = {folder!r}, {size!r}, {how!r}
    mount = lambda *words: subprocess.run(["mount", *words, folder], check=True)
    if step == 3:
        if ctypes.CDLL(None).unshare(0x20000):  # a view of the file systems of its own
            os._exit(77)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        shutil.copytree(folder, folder + ".before")
        mount("-t", "tmpfs", "-o", "size=" + size, "tmpfs")
        shutil.copytree(folder + ".before", folder, dirs_exist_ok=True)
        mount("-o", "remount," + how)
    if step == 12:
        shutil.copytree(folder, folder + ".after")
"""


@pytest.mark.parametrize(
    ("size", "how", "reason"),
    [("1100k", "rw", "No space left on device"), ("9m", "ro", "Read-only file system")],
)
def test_a_folder_that_takes_no_more_keeps_the_last_good_checkpoint(
    images, tmp_path, monkeypatch, size, how, reason
):
    words = f"--dataset folder --data {images} {LINE} --checkpoint-steps 2".split()
    words += ["--run-dir", tmp_path / "run", "--tensorboard", "False", "--save-plot", "False"]
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    act = MOUNTED.format(folder=str(tmp_path / "run"), size=size, how=how)
    end = run(tmp_path, *words, act=act)
    if end.code == 77:
        pytest.skip("needs the right to mount")
    checkpoint = tmp_path / "run" / "checkpoint.pth.tar"
    assert end.code == 2 and f"main.py: error: {checkpoint}: {reason} (" in end.err, end
    assert f"warning: {checkpoint}: {reason}" in end.out
    kept = tmp_path / "run.after" / "checkpoint.pth.tar"
    assert load_checkpoint(kept)["step"] == 2
    (rescued,) = tmp_path.glob("run-*/checkpoint.pth.tar")
    assert f"; the last checkpoint was saved to {rescued}" in end.err
    assert load_checkpoint(rescued)["step"] == 12
