"""Search for the shortest training, with known accuracies and with real runs of main.py."""

import sys
from argparse import Namespace
from subprocess import CompletedProcess

import pytest

import main
from scripts.paper import time_to_accuracy
from scripts.paper.records import ROOT
from scripts.paper.runner import read_summary
from scripts.paper.time_to_accuracy import Outcome, format_outcomes, search
from util.checkpoint.store import LATEST_NAME, PREVIOUS_NAME

QUIET = "--use-gpu False --threads 1 --save-plot False --tensorboard False"


def make_flags(**kwargs):
    return Namespace(**{"lr": [0.1], "seeds": [0], "grain": 25, "longest": 1000} | kwargs)


@pytest.mark.parametrize("begin", [25, 75, 125, 150, 400])
def test_the_shortest_training_that_reaches_the_target_is_found(begin):
    tried = []

    def train(lr, steps, seed):
        tried.append(steps)
        return {"test_top1": steps / 2}

    assert search(train, make_flags(target=61), begin).steps == 125
    assert 100 in tried and all(steps % 25 == 0 for steps in tried)


def test_rates_are_compared_after_trainings_as_long_as_the_search_begins_with():
    flags = make_flags(lr=[0.01, 0.1], seeds=[0, 1], target=61)
    train = lambda lr, steps, seed: {"test_top1": steps / 2 if lr == 0.01 else 20 + steps / 4}
    outcome = search(train, flags, 110)  # .1 is ahead up to 80 steps
    assert outcome.screened == {0.01: 50, 0.1: 45} and (outcome.lr, outcome.steps) == (0.01, 125)


def test_a_target_out_of_reach_ends_the_search():
    with pytest.raises(SystemExit, match="90 %.*100 steps"):
        search(lambda *run: {"test_top1": 50}, make_flags(target=90, longest=100), 25)


def test_the_table_compares_means_of_seconds():
    def make(screened, steps, *runs):
        keys = ("test_top1", "train_seconds")
        return Outcome(screened, steps, [dict(zip(keys, run, strict=True)) for run in runs])

    slow = make({0.01: 60.0, 0.1: 20.0}, 400, (70.1, 100), (70.3, 300))
    fast = make({0.01: 50.0, 0.1: 65.0}, 200, (71.0, 100), (70.0, 100))
    text = format_outcomes({"bn": slow, "deconv": fast}, 70)
    assert (
        "| BatchNorm | 0.01: 60.0, 0.1: 20.0 | 0.01 | 400 | 70.10, 70.30 | 100, 300 | 200 |" in text
    )
    assert "0.1 | 200" in text and "2.00 times as fast" in text


def test_runs_of_the_main_script_are_made_once(tmp_path, capfd, monkeypatch):
    """The runs share this process; the tests below start processes as the script does."""

    def run_here(line, cwd):
        assert line[:2] == [sys.executable, "main.py"] and cwd == ROOT
        main.main(line[2:])
        return CompletedProcess(line, 0)

    monkeypatch.setattr(time_to_accuracy, "subprocess", Namespace(run=run_here))
    line = "--target 1 --lr .03 --seeds 0 --begin 6 6 --grain 6 --dataset digits"
    line += f" --arch simple_v2 --batch-size 32 {QUIET} --out {tmp_path}"
    time_to_accuracy.main(line.split())
    first = capfd.readouterr().out
    assert "times as fast" in first and "epoch 1/" in first
    timed = [path.parent.name for path in tmp_path.glob("timed/*/summary.json")]
    assert sorted(name.split("-lr")[0] for name in timed) == ["deconvFalse", "deconvTrue"]
    time_to_accuracy.main(line.split())
    again = capfd.readouterr().out
    assert again.startswith("| ") and again in first


def test_a_run_that_was_stopped_goes_on(tmp_path):
    own = {"lr": 0.03, "seed": 0, "max-steps": 6}
    flags = f"--dataset digits --arch simple_v1 --batch-size 479 {QUIET}".split()  # two epochs
    folder = tmp_path / "lr0.03-seed0-max-steps6"
    main.main(["--lr", "0.03", "--seed", "0", "--max-steps", "6", "--run-dir", str(folder), *flags])
    first = read_summary(folder)
    (folder / PREVIOUS_NAME).replace(folder / LATEST_NAME)  # as if stopped after the first epoch
    (folder / "summary.json").unlink()
    assert time_to_accuracy.run(tmp_path, own, flags)["test_top1"] == first["test_top1"]


def test_a_run_that_fails_ends_the_search_with_its_error(tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        time_to_accuracy.main(f"--target 15 --out {tmp_path} --dataset nothing".split())
    assert stop.value.code == 2
    assert "--dataset" in capfd.readouterr().err
