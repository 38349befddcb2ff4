import os

from util.files import atomic_write, clear_leftovers


def test_only_leftovers_of_saves_are_cleared(tmp_path):
    for name in (".checkpoint.pth.tar.123.tmp", ".mine.tmp", ".notes", "file.12.tmp"):
        (tmp_path / name).touch()
    clear_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".mine.tmp", ".notes", "file.12.tmp"}


def test_a_file_and_its_folder_reach_the_disk_in_order(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    with atomic_write(tmp_path / "file") as file:
        file.write(b"text")
    assert calls == ["fsync", "replace", "fsync"]
    assert (tmp_path / "file").read_bytes() == b"text"
