import errno
import os
import shutil

import pytest

from tests.states import make_state
from util.checkpoint.store import load_checkpoint, save_checkpoint
from util.errors import CheckpointError, RunError
from util.tracking import run_dir as run_dir_module
from util.tracking.run_dir import (
    check_unchanged,
    copy_previous_run,
    find_out,
    find_run_dir,
    open_run_dir,
)


def test_runs_of_one_second_get_folders_of_their_own(tmp_path):
    folders = {open_run_dir(None, str(tmp_path), "digits-vgg11-bn")[0] for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.is_dir() and folder.parent.name == "digits-vgg11-bn" for folder in folders)


def test_a_resumed_run_finds_the_cached_statistics_where_it_has_written_them(tmp_path):
    folder = tmp_path / "digits-vgg11-bn"
    folders = {open_run_dir(None, str(tmp_path), folder.name)[0] for _ in range(2)}
    assert {find_out(path) for path in folders} == {tmp_path}  # one name ends in -1
    assert find_out(folder / "run") == folder


def test_a_folder_that_holds_a_run_is_taken_for_its_own_continuation_only(tmp_path):
    checkpoint = str(tmp_path / "checkpoint.pth.tar")
    (tmp_path / "args.json").touch()
    assert find_run_dir(str(tmp_path), None) == tmp_path  # it ended before its first epoch
    (tmp_path / "checkpoint.pth.tar").touch()
    assert find_run_dir(None, None) is None
    assert find_run_dir(None, checkpoint) == tmp_path
    assert find_run_dir(str(tmp_path), checkpoint) == tmp_path
    assert find_run_dir(str(tmp_path / "new"), checkpoint) == tmp_path / "new"
    with pytest.raises(RunError, match="holds a run"):
        find_run_dir(str(tmp_path), None)
    with pytest.raises(RunError, match="holds a run"):
        find_run_dir(str(tmp_path), str(tmp_path / "elsewhere" / "checkpoint.pth.tar"))
    with pytest.raises(RunError, match="not a folder"):
        find_run_dir(str(tmp_path / "args.json"), None)


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file/run cannot be created"):
        open_run_dir(tmp_path / "file" / "run", "", "")


def save(folder, epoch, best_epoch, batches=0):
    """A checkpoint of `epoch`, when `best_epoch` was the best; returns what it knows."""
    folder.mkdir(exist_ok=True)
    state = make_state(epoch=epoch, best_epoch=best_epoch, batches=batches)
    save_checkpoint(state, folder, is_best=epoch == best_epoch and not batches)
    return state


def best_epoch(folder):
    path = folder / "model_best.pth.tar"
    return load_checkpoint(path)["epoch"] if path.exists() else None


@pytest.mark.parametrize("in_place", [True, False])
def test_the_best_network_that_the_checkpoint_knows_comes_along(tmp_path, in_place):
    old = tmp_path / "old"
    new = old if in_place else tmp_path / "new"
    new.mkdir()
    resume = tmp_path / "link"
    resume.symlink_to(old / "checkpoint.pth.tar")
    save(old, 1, best_epoch=1)
    second = save(old, 2, best_epoch=1)
    copy_previous_run(str(resume), second, new)
    assert best_epoch(new) == 1
    third = save(old, 3, best_epoch=3)
    copy_previous_run(str(resume), second, new)  # the best beside it is of a later epoch
    assert best_epoch(new) is None
    third["progress"]["latest"] = {"test_top1": 1.0}  # of another metric than the best
    copy_previous_run(str(resume), third, new)  # it is the best itself
    assert best_epoch(new) == 3
    copy_previous_run(str(resume), save(old, 3, best_epoch=3, batches=2), new)
    assert best_epoch(new) == 3  # the one beside it, not itself
    copy_previous_run(None, None, new)
    assert best_epoch(new) is None


def test_the_last_best_stays_where_a_better_one_found_the_disk_full(tmp_path, monkeypatch):
    save(tmp_path, 1, best_epoch=1)

    def refuse(*files):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full, pytest.raises(OSError, match="No space left"):
        full.setattr(shutil, "copyfileobj", refuse)
        save(tmp_path, 2, best_epoch=2)
    third, latest = save(tmp_path, 3, best_epoch=2), str(tmp_path / "checkpoint.pth.tar")
    copy_previous_run(latest, third, tmp_path)
    assert best_epoch(tmp_path) == 1


@pytest.mark.parametrize("broken", ["copyfileobj", "load_checkpoint"])
def test_a_fault_of_the_disk_takes_no_checkpoint_away(tmp_path, monkeypatch, broken):
    save(tmp_path, 1, best_epoch=1)
    known = save(tmp_path, 2, best_epoch=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(*files):
        fault = OSError(errno.EIO, "Input/output error", str(files[0]))
        if broken == "load_checkpoint":
            raise CheckpointError("cannot be read") from fault
        raise fault

    monkeypatch.setattr(shutil if broken == "copyfileobj" else run_dir_module, broken, refuse)
    resume = str(tmp_path / "checkpoint_previous.pth.tar")
    if broken == "copyfileobj":
        known = load_checkpoint(resume)
    with pytest.raises(OSError, match="Input/output error"):
        copy_previous_run(resume, known, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_checkpoint_that_is_continued_becomes_the_latest(tmp_path):
    for epoch in (1, 2):
        save(tmp_path, epoch, best_epoch=1)
    previous = tmp_path / "checkpoint_previous.pth.tar"
    (tmp_path / "checkpoint.pth.tar").write_bytes(b"damaged")
    copy_previous_run(str(previous), load_checkpoint(previous), tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint.pth.tar")["epoch"] == 1
    assert not previous.exists()
    assert best_epoch(tmp_path) == 1


def test_a_link_in_the_place_of_the_lock_empties_no_other_file(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RunError, match=r"\.lock cannot be created: Too many levels of symbolic"):
        open_run_dir(tmp_path, "", "")
    assert (tmp_path / "precious").read_text() == "precious"


def test_what_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path / ".summary.json.77.tmp").touch()
    assert open_run_dir(tmp_path, "", "")[0] == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_run_that_another_process_has_gone_on_with_is_not_taken_up(tmp_path):
    checkpoint = str(tmp_path / "checkpoint.pth.tar")
    check_unchanged(tmp_path, None, None)
    read = save(tmp_path, 1, best_epoch=1)
    check_unchanged(tmp_path, checkpoint, read)
    with pytest.raises(RunError, match="already holds a run"):
        check_unchanged(tmp_path, None, None)
    save(tmp_path, 2, best_epoch=1)
    with pytest.raises(RunError, match="another process has trained from step 5 to 10"):
        check_unchanged(tmp_path, checkpoint, read)


def test_the_rows_of_earlier_batches_come_along(tmp_path):
    known = save(tmp_path / "old", 1, best_epoch=1)
    (tmp_path / "old" / "train_batch.log").write_text("rows")
    (tmp_path / "new").mkdir()
    resume = str(tmp_path / "old" / "checkpoint.pth.tar")
    copy_previous_run(resume, known, tmp_path / "new")
    assert (tmp_path / "new" / "train_batch.log").read_text() == "rows"
    (tmp_path / "old" / "train_batch.log").unlink()
    os.mkfifo(tmp_path / "old" / "train_batch.log")  # nobody writes there
    copy_previous_run(resume, known, tmp_path / "new")
    assert not (tmp_path / "new" / "train_batch.log").exists()
