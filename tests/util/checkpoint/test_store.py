"""Checkpoint files: kept through crashes, refused when damaged or foreign, never executed."""

import errno
import os
import pickle
import random
import signal
import time
import zipfile
from collections import Counter, OrderedDict
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.states import make_state
from util.checkpoint import store
from util.checkpoint.store import (
    FORMAT_VERSION,
    _check_archive,
    check_compatible,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from util.errors import CheckpointError
from util.files import clear_leftovers
from util.random_state import set_rng_state


class Malicious:
    """Object that makes a folder when a careless reader unpickles it."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def test_a_checkpoint_comes_back_with_the_same_values_and_types(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2]).state_dict()
    state = make_state(scheduler=schedule)
    path = save_checkpoint(state, tmp_path)
    loaded = load_checkpoint(path)
    assert path == tmp_path / "checkpoint.pth.tar"
    assert set(loaded) == {*state, "format_version"}
    assert loaded["config"] == state["config"]
    assert isinstance(loaded["model"], OrderedDict)
    assert isinstance(loaded["scheduler"]["milestones"], Counter)
    momentum, saved = (s["optimizer"]["state"][0]["momentum_buffer"] for s in (loaded, state))
    assert torch.equal(momentum, saved)


def test_only_the_named_files_are_left_and_the_best_is_a_copy_of_its_time(tmp_path):
    save_checkpoint(make_state(), tmp_path, is_best=True)
    save_checkpoint(make_state(epoch=3), tmp_path)
    save_checkpoint(make_state(epoch=4), tmp_path)
    epochs = {path.name: load_checkpoint(path)["epoch"] for path in tmp_path.iterdir()}
    assert epochs == {
        "checkpoint.pth.tar": 4,
        "checkpoint_previous.pth.tar": 3,
        "model_best.pth.tar": 2,
    }


def test_the_latest_two_stay_where_a_file_can_have_one_name_only(tmp_path, monkeypatch):
    def refuse(source, other):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for epoch in (2, 3, 4):
        save_checkpoint(make_state(epoch=epoch), tmp_path)
    epochs = {path.name: load_checkpoint(path)["epoch"] for path in tmp_path.iterdir()}
    assert epochs == {"checkpoint.pth.tar": 4, "checkpoint_previous.pth.tar": 3}


def test_the_newest_that_can_be_read_is_found(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path.name}: no checkpoint in this folder"):
        load_newest(tmp_path, load_checkpoint)
    names = ["model_best.pth.tar", "checkpoint_9.pth.tar", "checkpoint_previous.pth.tar"]
    for step, name in enumerate([*names, "checkpoint.pth.tar"]):
        save_checkpoint(make_state(step=step), tmp_path, filename=name)
    (tmp_path / "checkpoint_previous.pth.tar").touch()  # as old as ever; its step counts
    damaged = []
    for name, step in (("checkpoint.pth.tar", 3), (names[2], 2), (names[1], 1), (names[0], 0)):
        path, state, faults = load_newest(tmp_path, load_checkpoint)
        assert (path.name, state["step"]) == (name, step)
        assert {fault.split(":")[0] for fault in faults} == set(damaged)
        path.write_bytes(path.read_bytes()[:-9])
        damaged.append(str(path))
    with pytest.raises(CheckpointError) as caught:
        load_newest(tmp_path, load_checkpoint)
    assert str(caught.value).count("damaged") == 4


def test_a_checkpoint_that_must_not_be_read_is_not_passed_over(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(make_state(step=step), tmp_path)
    check_archive = _check_archive  # root may read a file of any mode

    def refuse(path):
        if path.name == "checkpoint.pth.tar":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        check_archive(path)

    monkeypatch.setattr(store, "_check_archive", refuse)
    with pytest.raises(CheckpointError, match=r"h\.tar: Permission denied: it may be the newest"):
        load_newest(tmp_path, load_checkpoint)


def save_forever(folder, writer, ballast):
    """Save until killed; only in a child, which never returns to pytest."""
    try:
        for step in count(1):
            save_checkpoint(make_state(step=step, ballast=ballast), folder)
            os.write(writer, b".")
    finally:
        os._exit(1)


def test_a_process_killed_while_it_saves_leaves_a_checkpoint_that_loads(tmp_path):
    """Kill a hundred saves at random moments; no finished save is lost."""
    rng, leftovers = random.Random(0), 0
    ballast = torch.zeros(100_000)  # made before the fork, whose child has no threads of PyTorch
    save_checkpoint(make_state(step=0), tmp_path)
    for _ in range(100):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            save_forever(tmp_path, writer, ballast)
        os.close(writer)
        os.read(reader, 1)  # the child has saved once
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        finished = 1 + len(os.read(reader, 10_000))
        os.close(reader)
        path, state, faults = load_newest(tmp_path, load_checkpoint)
        assert (path.name, faults) == ("checkpoint.pth.tar", [])
        assert state["step"] in (finished, finished + 1)
        leftovers += len(list(tmp_path.glob(".*")))
        clear_leftovers(tmp_path)
        assert not list(tmp_path.glob(".*"))
    assert leftovers > 10  # else nothing was tested


@pytest.mark.parametrize(
    "bad, reason",
    [
        ({"note": np.float64(1)}, "numpy"),
        ({"config": {"epochs": 9, "out": Path("runs")}}, "pathlib"),
    ],
)
def test_a_state_that_would_not_load_is_refused_and_the_old_checkpoint_stays(tmp_path, bad, reason):
    path = save_checkpoint(make_state(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=f"checkpoint.pth.tar.*{reason}"):
        save_checkpoint(make_state(**bad), tmp_path)
    state = make_state()
    del state["optimizer"]
    with pytest.raises(CheckpointError, match="optimizer is missing"):
        save_checkpoint(state, tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_checkpoint(make_state(), tmp_path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(store.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(make_state(epoch=3), tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_checkpoint_are_refused_by_name_and_reason(tmp_path):
    state = make_state()
    good = save_checkpoint(state, tmp_path).read_bytes()
    flipped = bytearray(good)
    flipped[good.index(state["model"]["weight"].numpy().tobytes())] ^= 255
    foreign = tmp_path / "weights.pth"
    torch.save({"state_dict": {}}, foreign)
    contents = {
        "empty": (b"", "the file is empty"),
        "text": (b"hello world", "damaged, or not a checkpoint"),
        "halved": (good[: len(good) // 2], "damaged, or not a checkpoint"),
        "shortened": (good[:-1], "damaged, or not a checkpoint"),
        "flipped": (bytes(flipped), "wrong checksum"),
        "foreign": (foreign.read_bytes(), "no format_version"),
    }
    for name, (content, reason) in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=reason) as caught:
            load_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "weights_only" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="none.pth.tar: No such file"):
        load_checkpoint(tmp_path / "none.pth.tar")
    with pytest.raises(CheckpointError, match=f"{tmp_path.name}: Is a directory"):
        load_checkpoint(str(tmp_path))


PLACES = [number / 20 for number in range(20)]


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
    path = save_checkpoint(make_state(), tmp_path)
    content = path.read_bytes()
    for place in PLACES:
        path.write_bytes(content[: round(place * len(content))])
        with pytest.raises(CheckpointError, match=f"^{path}: "):
            load_checkpoint(path)


def test_bits_flipped_anywhere_are_noticed_or_mean_nothing(tmp_path):
    """Flip bits; only the unused bytes between records may change unnoticed."""
    path = save_checkpoint(make_state(ballast=torch.rand(1000)), tmp_path)
    content, expected = path.read_bytes(), repr(load_checkpoint(path))
    rng, noticed = random.Random(0), 0
    for place in PLACES:
        flipped = bytearray(content)
        flipped[round(place * len(content)) + rng.randrange(100)] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert repr(load_checkpoint(path)) == expected
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ")
            noticed += 1
    assert noticed >= 10


def test_another_format_and_missing_parts_are_named(tmp_path):
    path = tmp_path / "file"
    torch.save({**make_state(), "format_version": 99}, path)
    with pytest.raises(CheckpointError, match=f"^{path}: format_version is 99.*train again"):
        load_checkpoint(path)
    torch.save({"format_version": FORMAT_VERSION, "epoch": 1}, path)
    with pytest.raises(CheckpointError, match="content: step is missing"):
        load_checkpoint(path)


def with_pickle(path, pickled):
    """Replace the pickle in the checkpoint at `path`."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)


def hide(where, malicious):
    """Return a state that hides an object at a place."""
    state = {**make_state(), "format_version": FORMAT_VERSION}
    if where == "settings":
        state["config"]["out"] = malicious
    elif where == "optimizer":
        state["optimizer"]["state"][0]["momentum_buffer"] = [[malicious]]
    elif where == "attributes":
        state["model"]["weight"] = torch.nn.Parameter(state["model"]["weight"])
        state["model"]["weight"].note = malicious
    else:
        state["model"] = OrderedDict({malicious: 1})
    return state


@pytest.mark.parametrize("where", ["settings", "optimizer", "attributes", "keys"])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, where):
    trace, path = tmp_path / "trace", tmp_path / "malicious.pth.tar"
    state = hide(where, Malicious(trace))
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"malicious\.pth\.tar: refused, .*mkdir"):
        load_checkpoint(path)
    for foreign in (pickle.dumps(state["config"]), pickle.dumps(Malicious(trace))):
        path.write_bytes(foreign)
        with pytest.raises(CheckpointError, match=r"malicious\.pth\.tar: damaged, or not"):
            load_checkpoint(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())  # what a careless reader does
    assert trace.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"cos\nmkdir\n(S'{trace}'\ntR.",  # a global and a call
        b"(S'{trace}'\nios\nmkdir\n.",  # both at once
        b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93(S'{trace}'\ntR.",  # the names from the stack
        b"ctorch\n_utils.os.mkdir\n(S'{trace}'\ntR.",  # by way of a module that is trusted
        b'cbuiltins\neval\n(S\'__import__("os").mkdir("{trace}")\'\ntR.',
    ],
)
def test_pickles_made_by_hand_are_refused(tmp_path, pickled):
    trace = tmp_path / "trace"
    path = save_checkpoint(make_state(), tmp_path)
    with_pickle(path, pickled.replace(b"{trace}", str(trace).encode()))
    with pytest.raises(CheckpointError, match=f"^{path}: "):
        load_checkpoint(path)
    assert not trace.exists()


def test_a_program_of_torchscript_is_refused(tmp_path):
    path = tmp_path / "program.pth.tar"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(CheckpointError, match=f"^{path}: "):
        load_checkpoint(path)


def test_no_other_reader_of_pickles_is_in_use():
    root = Path(__file__).resolve().parents[3]
    for path in (*root.glob("*.py"), *root.glob("util/**/*.py"), *root.glob("scripts/**/*.py")):
        text = path.read_text()
        assert "weights_only=False" not in text and "pickle.load" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True)"), path


def test_every_generator_continues_where_it_was(tmp_path):
    draw = lambda: (torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1))  # noqa: NPY002
    draw()  # leaves half of a pair of normal numbers behind in numpy and python
    path = save_checkpoint(make_state(), tmp_path)
    expected = draw()
    draw()
    set_rng_state(load_checkpoint(path)["rng"][0])
    assert draw() == expected


@pytest.mark.gpu
def test_the_generator_of_a_gpu_continues_where_it_was(tmp_path):
    torch.rand(1, device="cuda")
    path = save_checkpoint(make_state(), tmp_path)
    expected = torch.rand(3, device="cuda")
    set_rng_state(load_checkpoint(path)["rng"][0])
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_what_differs_from_the_checkpoint_is_named_with_both_values():
    saved = {"arch": "vgg11", "deconv": True, "block": 16}
    check_compatible(saved, dict(saved))
    check_compatible(saved, {**saved, "block": 16.0})  # the default and a typed value
    with pytest.raises(CheckpointError, match="block is 16 in the checkpoint, 64 in this run"):
        check_compatible(saved, {**saved, "block": 64})
    with pytest.raises(CheckpointError, match="mode is absent in the checkpoint, 5 in this run"):
        check_compatible(saved, {**saved, "mode": 5})
    with pytest.raises(CheckpointError, match="deconv is True in the checkpoint, 1 in this run"):
        check_compatible(saved, {**saved, "deconv": 1})
    saved["classes"] = ("cat", "dog", "owl")
    for classes, message in (
        (("cat", "dog"), "the number of classes is 3 in the checkpoint, 2 in this run"),
        (("cat", "cow", "owl"), r"classes\[1\] is 'dog' in the checkpoint, 'cow' in this run"),
        ("c" * 200, r"classes is \('cat', 'dog', 'owl'\) in the checkpoint, \[...\] in this"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_compatible(saved, {**saved, "classes": classes})
    with pytest.raises(CheckpointError, match="arch is 'vgg11' in the checkpoint, absent in"):
        check_compatible(saved, {"deconv": True, "block": 16})
