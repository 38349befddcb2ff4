import json
import random

import numpy as np
import pytest
import torch

from util import run


def test_the_cpu_is_taken_where_the_gpu_is_declined(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run.choose_device(None, None).type == "cuda"
    assert run.choose_device(False, None).type == "cpu"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.choose_device(None, None).type == "cpu"
    with pytest.raises(run.RunError, match="--use-gpu True"):
        run.choose_device(True, None)


def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        run.choose_device(False, before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_seeding_repeats_all_generators():
    def draw():
        run.seed_everything(2**40)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    assert draw() == draw()


def test_runs_of_one_second_get_folders_of_their_own(tmp_path):
    folders = {run.open_run_dir(None, str(tmp_path), "digits-vgg11-bn") for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.is_dir() and folder.parent.name == "digits-vgg11-bn" for folder in folders)


def test_a_folder_that_holds_a_run_is_taken_for_its_own_continuation_only(tmp_path):
    (tmp_path / "args.json").touch()
    checkpoint = str(tmp_path / "checkpoint.pth.tar")
    assert run.find_run_dir(None, None) is None
    assert run.find_run_dir(None, checkpoint) == tmp_path
    assert run.find_run_dir(str(tmp_path), checkpoint) == tmp_path
    assert run.find_run_dir(str(tmp_path / "new"), checkpoint) == tmp_path / "new"
    with pytest.raises(run.RunError, match="holds a run"):
        run.find_run_dir(str(tmp_path), None)
    with pytest.raises(run.RunError, match="holds a run"):
        run.find_run_dir(str(tmp_path), str(tmp_path / "elsewhere" / "checkpoint.pth.tar"))
    with pytest.raises(run.RunError, match="not a folder"):
        run.find_run_dir(str(tmp_path / "args.json"), None)


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(run.RunError, match="file/run cannot be made"):
        run.open_run_dir(tmp_path / "file" / "run", "", "")


def test_the_best_network_comes_along_once(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    run.carry_best(old, new)
    assert not list(new.iterdir())
    (old / "model_best.pth.tar").write_text("first")
    run.carry_best(old, new)
    (old / "model_best.pth.tar").write_text("second")
    run.carry_best(old, new)
    assert (new / "model_best.pth.tar").read_text() == "first"


def test_the_record_tells_flags_versions_commit_and_device(tmp_path):
    run.write_record(tmp_path, {"lr": 0.1}, torch.device("cpu"))
    record = json.loads((tmp_path / "args.json").read_text())
    assert record["flags"] == {"lr": 0.1}
    assert record["versions"]["torch"] == torch.__version__
    assert {"python", "torchvision", "numpy"} <= set(record["versions"])
    assert record["commit"] is None or len(record["commit"]) == 40
    assert record["device"].startswith("cpu, ")


@pytest.mark.parametrize("finished", [True, False])
def test_an_interrupt_names_the_last_checkpoint(tmp_path, capsys, finished):
    if finished:
        (tmp_path / "checkpoint.pth.tar").touch()
    with pytest.raises(SystemExit) as stop, run.tell_where_to_continue(tmp_path):
        raise KeyboardInterrupt
    assert stop.value.code == 130
    told = capsys.readouterr().err.strip()
    expected = f"--resume {tmp_path / 'checkpoint.pth.tar'}" if finished else "no epoch"
    assert expected in told and "\n" not in told
