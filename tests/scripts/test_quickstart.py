"""The quick start: rates and verdict from fabricated runs, and a small real comparison."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import quickstart
from scripts.quickstart import (
    RATES,
    SEEDS,
    Run,
    RunFailed,
    choose_rate,
    format_final,
    format_search,
    format_verdict,
)
from tests.pairwise import loop_over

BEST = {"BatchNorm": 0.1, "deconvolution": 0.3}
SMALL = ["--dataset", "digits", "--arch", "simple_v1", "--max-steps", "2"]


def make_summary(top1):
    return {
        "test_top1": top1,
        "train_loss": 0.5,
        "train_seconds": 5.0,
        "steps": 100,
        "batch_size": 64,
    }


def make_final(bn, deconv):
    """Runs at the best rates, by their accuracies; None diverged."""
    return {
        Run(kind, BEST[kind], seed): None if top1 is None else make_summary(top1)
        for kind, scores in zip(BEST, (bn, deconv), strict=True)
        for seed, top1 in zip(SEEDS, scores, strict=True)
    }


@pytest.mark.parametrize(
    ("bn", "deconv", "sentence"),
    [
        (
            (76, 77, 78),
            (85, 86, 87),
            "deconvolution is 9.0 points better than BatchNorm (test top-1 86.0 % against 77.0 %",
        ),
        (
            (85, 86, 87),
            (76, 77, 78),
            "BatchNorm is 9.0 points better than deconvolution (test top-1 86.0 % against 77.0 %",
        ),
        ((80, 82, 84), (81, 83, 85), "do not differ by more than the seeds differ"),
        ((80, 80, 80), (80, 80, 80), "do not differ by more than the seeds differ"),
        ((80, 80, 80), (81, None, 81), "1.0 points better than BatchNorm"),
    ],
)
def test_the_verdict_follows_from_the_runs(bn, deconv, sentence):
    final = make_final(bn, deconv)
    verdict = format_verdict(final)
    assert sentence in verdict and "\n" not in verdict and verdict.startswith("After 100 steps")
    assert ("2 seeds or 3 seeds" if None in deconv else "mean of 3 seeds") in verdict


def make_search(bn, deconv):
    return {
        Run(kind, rate, SEEDS[0]): None if top1 is None else make_summary(top1)
        for kind, scores in zip(BEST, (bn, deconv), strict=True)
        for rate, top1 in zip(RATES, scores, strict=True)
    }


def test_the_best_rate_is_that_of_the_highest_accuracy():
    search = make_search((70, 75, 75, None), (80, 81, 82, 83))
    best = {kind: choose_rate(search, kind) for kind in BEST}
    assert best == {"BatchNorm": 0.1, "deconvolution": 1.0}
    *_, bn, deconv, note = format_search(search, best).split("\n")
    assert bn.split() == ["BatchNorm", "70.0", "75.0*", "75.0", "diverged"]
    assert deconv.split() == ["deconvolution", "80.0", "81.0", "82.0", "83.0*"]
    assert note == "Best rates at an end of the range: deconvolution: 1."


def test_a_kind_that_diverges_at_every_rate_is_an_error():
    with pytest.raises(RunFailed, match="BatchNorm diverged at every learning rate"):
        choose_rate(make_search((None,) * 4, (80,) * 4), "BatchNorm")


def test_the_final_table_has_means_and_ranges():
    _, _, bn, _ = format_final(make_final((76, 77, 78), (85, 86, 87)), BEST).split("\n")
    assert bn.split() == ["BatchNorm", "0.1", "0.500", "77.0", "76.0", "to", "78.0", "5.0"]


def test_a_small_comparison_runs_to_its_verdict(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "RATES", (0.1,))
    monkeypatch.setattr(quickstart, "SEEDS", (0,))
    quickstart.main(["--out", str(tmp_path), *SMALL])
    *_, verdict, _, curves, wall_clock = capsys.readouterr().out.splitlines()
    assert verdict.startswith("After 2 steps, each at its own best learning rate")
    assert curves == f"curves: {tmp_path / 'comparison.png'}" and "time: " in wall_clock
    assert (tmp_path / "comparison.png").stat().st_size > 0


def test_a_run_that_fails_ends_the_comparison_with_its_message(tmp_path, capsys):
    missing = str(tmp_path / "missing")
    with pytest.raises(SystemExit) as end:
        quickstart.main(["--out", str(tmp_path), "--dataset", "folder", "--data", missing])
    message = capsys.readouterr().err
    assert end.value.code == 1 and message.startswith("quickstart.py: error: exit code 2, see ")
    assert missing in message and message.count("\n") == 1


@loop_over(
    ("words", "message"),
    [
        (["--lr", "1"], "--lr is not passed on: this script sets it"),
        (["--learning-rate=1"], "--learning-rate is not passed on"),
        (["--deconv"], "--deconv is not passed on"),
        (["--run-dir", "x"], "--run-dir is not passed on"),
        (["--ou", "x"], "unrecognized arguments: --ou x; did you mean --out?"),
        (["--wd", "-1"], "argument --wd/--weight-decay: expected a number"),
        (["--data", "x"], "--data x does not apply to fashion-mini, which is embedded"),
        (["--mode", "3"], "--mode 3 "),
    ],
)
def test_bad_flags_are_refused_once_and_before_any_training(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        quickstart.main([*words, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and not (tmp_path / "out").exists()
    assert error.startswith(f"quickstart.py: error: {message}") and error.count("\n") == 1


def test_a_signal_ends_all_runs(tmp_path):
    script = Path(quickstart.__file__)
    command = [sys.executable, str(script), "--out", str(tmp_path), "--epochs", "1000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*/console.txt")):
        time.sleep(0.1)
        assert process.poll() is None
    time.sleep(0.5)
    process.terminate()
    _, message = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in message
    assert message.startswith("\nSIGTERM: stopping")
    assert not list(tmp_path.glob("*/summary.json"))
