"""Runs of several processes: gloo on the CPU, started as users start them."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

import main
from tests.util.distributed.test_world import free_port
from util.distributed.launcher import is_first_process, launch_workers
from util.tracking.logger import read_log

ROOT = Path(__file__).resolve().parents[3]
QUIET = "--use-gpu False --threads 1 --tensorboard False --save-plot False"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Return flags for runs of three steps an epoch on 24 images, which import no scikit-learn."""
    root = tmp_path_factory.mktemp("images")
    for number in range(32):
        folder = root / ("train" if number < 24 else "test") / ("dark", "bright")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), 7 * number).save(folder / f"{number}.png")
    return f"--dataset folder --data {root} --arch simple_v2 --batch-size 8 --lr .01 {QUIET}"


def launch(*command, **kwargs):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in command], cwd=ROOT, **pipes, **kwargs)


def finish(process):
    """Return exit code, standard output and standard error."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def check_same_curves(first, second):
    """Compare the curves of two runs up to float32 sums in another order.

    One of the 360 test images is 0.28 percent.
    """
    for name in ("train.log", "test.log"):
        ours, theirs = read_log(first / name), read_log(second / name)
        assert ours["lr"] == theirs["lr"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
        assert ours["top1"] == pytest.approx(theirs["top1"], abs=1.2)


def test_two_processes_train_as_one(tmp_path):
    line = "--dataset digits --arch simple_v2 --deconv True --batch-size 100 --max-steps 16"
    line = f"{line} --lr .02 --mixup .2 --cutmix 1 --auto-augment ta_wide"
    line = f"{line} --accum-steps 2 --ema .8 {QUIET}".split()
    main.main([*line, "--run-dir", str(tmp_path / "one")])
    code, out, err = finish(launch(*TORCHRUN, "main.py", *line, "--run-dir", tmp_path / "two"))
    assert code == 0, err
    assert out.count("epoch 1/2") == 1 and "2 processes" in out
    check_same_curves(tmp_path / "one", tmp_path / "two")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()}
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["processes"] == 2
    state = torch.load(tmp_path / "two" / "checkpoint.pth.tar", weights_only=True)
    assert len(state["rng"]) == 2


def test_two_machines_meet_as_the_published_flags_say(tmp_path, line):
    line = f"{line} --deconv True --max-steps 2 --run-dir {tmp_path / 'run'}".split()
    where = ["--dist-url", f"tcp://127.0.0.1:{free_port()}", "--multiprocessing-distributed"]
    machines = [
        launch(sys.executable, "main.py", *line, *where, "--world-size", 2, "--rank", rank)
        for rank in (1, 0)
    ]
    ends = [finish(machine) for machine in machines]
    assert [code for code, *_ in ends] == [0, 0], ends
    assert "2 processes" in ends[1][1] and not ends[0][1]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def test_a_machine_that_cannot_begin_keeps_no_other_waiting(tmp_path, line):
    """The second machine lacks the checkpoint of --resume and fails before the two have met."""
    line = f"{line} --max-steps 1 --run-dir {tmp_path / 'run'}".split()
    where = ["--master-addr", "127.0.0.1", "--master-port", free_port(), "--nnodes", 2]
    started = time.monotonic()
    machines = [
        launch(*TORCHRUN[:3], *where, "--node-rank", rank, "main.py", *line, *flags)
        for rank, flags in ((0, []), (1, ["--resume", tmp_path / "nowhere"]))
    ]
    (first, _, waiting), (second, _, guilty) = map(finish, machines)
    assert first and second and time.monotonic() - started < 60
    assert "[process 1] main.py: error: " in guilty and "nowhere" in guilty
    assert "main.py: error: another process has failed" in waiting


FAULTY = """
import os, sys
sys.path.insert(0, {root!r})
import main
from util.training import trainer

first_try = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
train_one_epoch, started = trainer.train_one_epoch, []

def fail_in_the_second_epoch(*args, **kwargs):
    started.append(1)
    if len(started) == 2 and first_try and os.environ["RANK"] == "1":
        {fault}
    return train_one_epoch(*args, **kwargs)

trainer.train_one_epoch = fail_in_the_second_epoch
main.main()
"""


def write_faulty(tmp_path, fault):
    path = tmp_path / "faulty.py"
    path.write_text(FAULTY.format(root=str(ROOT), fault=fault))
    return path


def test_a_failing_process_ends_the_run_with_its_own_error(tmp_path, line):
    fault = "from util.errors import DataError; raise DataError('image 7 is torn')"
    line = f"{line} --epochs 3 --run-dir {tmp_path / 'run'}".split()
    started = time.monotonic()
    code, _, err = finish(launch(*TORCHRUN, write_faulty(tmp_path, fault), *line))
    assert code != 0 and time.monotonic() - started < 60
    ours = [text for text in err.splitlines() if text and "main.py: error" in text]
    assert ours == ["[process 1] main.py: error: image 7 is torn"]
    assert "Traceback" not in err.partition("main.py: error")[0]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({0: -15, 1: 2}, 2),
        ({0: 1, 1: 2, 2: -15}, 2),  # 1: contact was lost
        ({0: 1, 1: -9}, "main.py: error: process 1 was ended by SIGKILL"),
        ({0: -15, 1: -15}, 1),
    ],
)
def test_a_process_that_was_killed_does_not_end_the_run_in_silence(monkeypatch, ends, expected):
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import errors

    def fail(words):
        failures = {rank: errors.ProcessFailure(0, 0, code, "") for rank, code in ends.items()}
        raise errors.ChildFailedError("main.py", failures)

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torchrun, "run", fail)
    flags = Namespace(world_size=None)
    with pytest.raises(SystemExit) as stop:
        launch_workers(str(ROOT / "main.py"), [], processes=3, flags=flags)
    assert stop.value.code == expected


def test_a_restarted_run_continues_from_its_last_checkpoint(tmp_path, line):
    line = f"{line} --epochs 2 --start-epoch 0 --run-dir {tmp_path / 'run'} --resume auto".split()
    faulty = write_faulty(tmp_path, "os._exit(9)")
    code, out, err = finish(launch(*TORCHRUN, "--max-restarts", 1, faulty, *line))
    assert code == 0, err
    assert [out.count(f"epoch {epoch}/2") for epoch in (1, 2)] == [1, 1]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 2


def test_an_interrupted_run_of_many_says_where_to_continue(tmp_path, line):
    line = f"{line} --arch vgg11 --run-dir {tmp_path / 'run'}".split()
    where = ["--dist-url", f"tcp://127.0.0.1:{free_port()}", "--world-size", 2]
    machines = [
        launch(*(sys.executable, "main.py", *line, *where, "--rank", rank), start_new_session=True)
        for rank in (0, 1)
    ]
    while not (tmp_path / "run" / "args.json").exists():
        time.sleep(0.1)
    for machine in machines:
        os.killpg(machine.pid, signal.SIGINT)
    ends = [finish(machine) for machine in machines]
    assert all(code != 0 for code, *_ in ends)
    assert "Traceback" not in ends[0][2] + ends[1][2], ends


def test_a_shell_completes_the_values_of_a_flag(tmp_path):
    pytest.importorskip("argcomplete")
    line = "main.py --arch vgg1"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words")}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": " "}
    assert finish(launch(sys.executable, "main.py", env=os.environ | asked)) == (0, "", "")
    assert (tmp_path / "words").read_text() == "vgg11 vgg13 vgg16 vgg19"


def test_a_shell_that_asks_in_vain_starts_no_training(tmp_path, monkeypatch):
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    with pytest.raises(SystemExit) as stop:
        main.main(["--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 1 and not (tmp_path / "run").exists()


def test_help_is_shown_once(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")  # set by another program; a rank of a run also has WORLD_SIZE
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert is_first_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, shown in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            main.main(["--help"])
        assert bool(capsys.readouterr().out) == shown


def test_one_error_is_enough_for_the_trouble_of_all(tmp_path):
    line = f"--dataset folder --data {tmp_path / 'nowhere'} --use-gpu False".split()
    code, out, err = finish(launch(*TORCHRUN, "main.py", *line))
    assert code != 0 and not out
    assert err.count("main.py: error: no folder") == 1


@pytest.mark.parametrize(
    ("flags", "processes", "expected"),
    [
        ({}, 2, "--nproc-per-node=2 --nnodes=1 --standalone"),
        (
            {"world_size": 3, "rank": 1, "dist_url": "tcp://host:29500"},
            4,
            "--nproc-per-node=4 --nnodes=3 --node-rank=1 --master-addr=host --master-port=29500",
        ),
        (
            {"world_size": 2, "rank": 0, "dist_url": "env://"},
            1,
            "--nproc-per-node=1 --nnodes=2 --node-rank=0 --master-addr=first --master-port=29501",
        ),
    ],
)
def test_every_visible_device_gets_a_process(monkeypatch, flags, processes, expected):
    from torch.distributed import run as torchrun

    words = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "first")
    monkeypatch.setenv("MASTER_PORT", "29501")
    monkeypatch.setattr(torchrun, "parse_args", words.extend)
    monkeypatch.setattr(torchrun, "run", lambda parsed: None)
    flags = Namespace(**{"world_size": None, "rank": None, "dist_url": None, **flags})
    given = {"processes": processes, "flags": flags}
    assert launch_workers("main.py", ["--lr", ".1"], **given)
    assert " ".join(words) == f"{expected} main.py --lr .1"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launch_workers("main.py", [], **given)  # torchrun has been asked already


def test_one_device_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert not launch_workers("main.py", [], processes=1, flags=Namespace(world_size=None))
