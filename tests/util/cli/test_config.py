"""Flags from files: YAML and args.json."""

import json
import sys
from pathlib import Path

import pytest

import main
import main_imagenet
from tests.pairwise import loop_over
from util.cli.settings import read_settings


def read(path, line="", script=main):
    flags, _ = read_settings(script.build_script(), ["--config", str(path), *line.split()])
    return vars(flags)


def write(tmp_path, text):
    path = tmp_path / "flags.yaml"
    path.write_text(text)
    return path


def record(folder, line):
    """Write the args.json of a run of main.py; return its folder."""
    flags, _ = read_settings(main.build_script(), line.split())
    (folder / "args.json").write_text(json.dumps({"flags": vars(flags), "versions": {}}))
    return folder


def test_flags_of_a_file_are_those_of_the_command_line_and_typed_ones_win(tmp_path):
    path = write(
        tmp_path,
        "arch: resnet18\nbatch_size: 64\nwd: 1e-3\namp: off  # a word\ndeconv: yes\n"
        "lr-scheduler: multistep\nmilestone: [60, 80]\n--seed: 5\nrun_dir: a b\n",
    )
    line = "--arch resnet18 --batch-size 64 --wd 1e-3 --amp off --deconv --seed 5 --lr-scheduler"
    argv = [*line.split(), "multistep", "--milestone", "60", "80", "--run-dir", "a b"]
    typed, _ = read_settings(main.build_script(), argv)
    assert read(path) == {**vars(typed), "config": str(path)}
    flags = read(path, "--seed 6 --milestone 50")
    assert (flags["seed"], flags["milestone"], flags["batch_size"]) == (6, [50.0], 64)


def test_the_file_of_the_documentation_is_accepted(tmp_path):
    page = (Path(main.__file__).parent / "docs" / "train.md").read_text()
    flags = read(write(tmp_path, page.partition("```yaml\n")[2].partition("```")[0]))
    assert (flags["arch"], flags["milestone"]) == ("vgg11", [0.5, 0.75])


def test_a_preset_of_a_file_is_overridden_by_its_other_flags(tmp_path):
    flags = read(write(tmp_path, "preset: paper\ndeconv: true\nbatch-size: 64"), "--wd 0")
    assert (flags["batch_size"], flags["weight_decay"], flags["num_groups"]) == (64, 0, 64)


def test_the_folder_of_images_is_a_flag_of_a_file_too(tmp_path):
    path = write(tmp_path, "deconv: true\ndata: here")
    assert read(path, script=main_imagenet)["data"] == "here"
    assert read(path, "there", main_imagenet)["data"] == "there"


@loop_over(
    ("text", "reason"),
    [
        ("batchsize: 3", "--batchsize=3; did you mean --batch-size?"),
        ("lr: much", "argument --lr/--learning-rate: expected a number above 0.*'much'"),
        ("lr:", "argument --lr/--learning-rate: expected a number"),
        ("amp: fp8", "argument --amp: invalid choice: 'fp8'"),
        ("mode: 3", "--mode 3 needs --deconv True"),
        ("wd: 0\nweight_decay: 0", "weight_decay: this flag is set twice"),
        ("lr: [1, 2]", "lr: expected one value, got a list of 2"),
        ("lr: {a: 1}", "lr: expected a value or a list of values"),
        ("config: more.yaml", "config more.yaml: a file cannot name another one"),
        ("- lr", "holds no flags; expected lines of NAME: VALUE"),
        ("", "holds no flags"),
        ("a: b: c", "not YAML: mapping values are not allowed here"),
        ("\N{NO-BREAK SPACE}".encode("latin-1"), "can't decode byte"),
    ],
)
def test_a_fault_is_one_line_that_names_the_file(tmp_path, capsys, text, reason):
    path = tmp_path / "flags.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        read(path)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    with pytest.raises(AssertionError, match=f"main.py: error: --config {path}: .*{reason}"):
        raise AssertionError(line)


def test_a_missing_file_and_a_missing_reader_of_yaml_are_named(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        read(tmp_path / "nowhere.yaml")
    assert "nowhere.yaml: No such file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(SystemExit):
        read(write(tmp_path, "lr: 1"))
    assert "pip install pyyaml" in capsys.readouterr().err
    assert read(record(tmp_path, "--lr 3"))["lr"] == 3


def test_an_earlier_run_gives_its_flags_without_its_folder_and_typed_flags_win(tmp_path, capsys):
    line = "--deconv True --eps .1 --mode 3 --milestone 60 --lr-scheduler multistep --max-steps 9"
    run = record(tmp_path, f"{line} --run-dir here --dataset digits")
    flags = read(run)
    plain, _ = read_settings(main.build_script(), f"{line} --dataset digits".split())
    assert flags == {**vars(plain), "config": str(run)}
    assert read(run / "args.json", "--epochs 70")["max_steps"] is None
    assert capsys.readouterr().out == ""
    flags = read(run, "--deconv False --epochs 50")
    assert (flags["batchnorm"], flags["num_groups_final"], flags["milestone"]) == (True, 0, [0.4])
    (told,) = capsys.readouterr().out.splitlines()
    for left_out in ("--mode 3 needs --deconv", "--eps 0.1 needs", "--milestone 60 must be below"):
        assert left_out in told
    assert (read(run)["lr"], read(run, "--optimizer AdamW")["lr"]) == (0.1, 1e-3)
    with pytest.raises(SystemExit):
        read(run, script=main_imagenet)
    assert f"--config {run / 'args.json'}: " in capsys.readouterr().err
