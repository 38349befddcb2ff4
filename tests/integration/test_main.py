"""Whole runs of main.py on real handwritten digits."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import main
from util.checkpoint.store import load_checkpoint, save_checkpoint
from util.cli.settings import read_settings
from util.data.images import DataSpec
from util.data.sampler import EpochBatches
from util.device import choose_algorithms
from util.distributed.world import World
from util.tracking.logger import read_log
from util.training import recorder as recorder_module
from util.training import trainer
from util.training.recorder import Recorder

ROOT = Path(__file__).resolve().parents[2]
QUIET = "--save-plot False --tensorboard False"
FILES = {
    *("args.json", "summary.json", "train.log", "test.log", "train_batch.log"),
    *("TrainingPlots.png", "checkpoint.pth.tar", "model_best.pth.tar"),
}


def train(line, run_dir=None):
    """Run main.py on digits; returns the summary."""
    argv = f"--dataset digits --arch simple_v2 --batch-size 128 {line}".split()
    main.main(argv if run_dir is None else [*argv, "--run-dir", str(run_dir)])
    return json.loads((run_dir / "summary.json").read_text()) if run_dir else None


def refusal(capsys, argv, code=2):
    """The one line with which main.py refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.main([str(word) for word in argv])
    assert stop.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("main.py: error: ")
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs, for tests that only look at it."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    train("--deconv True --epochs 2 --print-freq 5 --checkpoint-epoch 1", run_dir)
    return run_dir


def test_a_finished_network_is_tested_as_it_was_trained(finished, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    main.main(["-e", "--resume", str(finished)])  # --dataset and --arch are those of the run
    figures = json.loads((finished / "summary.json").read_text())
    told = f"test loss {figures['test_loss']:.4f} top1 {figures['test_top1']:.2f}%"
    assert told in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert before == {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert "-e needs --resume RUN" in refusal(capsys, ["-e"])
    assert "had no --ema" in refusal(capsys, ["-e", "--resume", finished, "--use-ema"])
    for words in ("--mode 3", "--dataset fashion --data x"):
        assert "checkpoint" in refusal(capsys, ["-e", "--resume", finished, *words.split()])


def test_a_moving_average_is_tested_beside_chooses_the_best_and_is_used(tmp_path, capsys):
    run_dir = tmp_path / "run"
    summary = train(f"--deconv True --arch mlp --epochs 2 --ema .8 {QUIET}", run_dir)
    header, *lines = (line.split("\t") for line in (run_dir / "test.log").read_text().splitlines())
    assert header[-2:] == ["ema_loss", "ema_top1"]
    accuracies = [float(line[-1]) for line in lines]
    assert summary["best_test_top1"] == pytest.approx(max(accuracies), abs=1e-3)
    assert summary["test_ema_top1"] == pytest.approx(accuracies[-1], abs=1e-3)
    assert summary["test_ema_loss"] != summary["test_loss"]
    for words, name in (("", "test_ema"), ("--use-ema False", "test")):
        capsys.readouterr()
        main.main(["-e", "--resume", str(run_dir), *words.split()])
        loss, top1 = summary[f"{name}_loss"], summary[f"{name}_top1"]
        assert f"test loss {loss:.4f} top1 {top1:.2f}%" in capsys.readouterr().out
    argv = ["--dataset", "digits", "--ema", ".999", "--epochs", "1", *QUIET.split()]
    told = refusal(capsys, [*argv, "--run-dir", tmp_path / "other"])
    assert "--ema 0.999: averages about 1000 steps" in told and not (tmp_path / "other").exists()


def test_both_kinds_learn_the_digits(tmp_path):
    assert train(f"--epochs 3 --batch-size 64 {QUIET}", tmp_path / "bn")["test_top1"] > 95
    assert train(f"--epochs 3 --deconv True {QUIET}", tmp_path / "deconv")["test_top1"] > 95


@pytest.mark.parametrize("mode", [1, 2, 3, 4, 5])
def test_every_mode_learns(tmp_path, mode):
    line = f"--deconv True --mode {mode} --epochs 1 {QUIET}"
    summary = train(line, tmp_path / "run")
    assert summary["kind"] == f"deconv-mode{mode}"
    assert summary["train_top1"] > 50


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("--amp bf16", ("amp", "bf16")),
        ("--channels-last", ("channels_last", True)),
        ("--warmup-epochs .5", ("warmup_epochs", 0.5)),
    ],
)
def test_other_ways_to_compute_learn_as_well(tmp_path, line, flag):
    figures = train(f"--deconv True --epochs 2 {line} {QUIET}", tmp_path / "run")
    assert figures["test_top1"] > 85
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert record["flags"][flag[0]] == flag[1]


def test_compiling_changes_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    line = f"--deconv True --batch-size 32 --max-steps 3 --threads 1 {QUIET}"
    plain = train(line, tmp_path / "plain")
    compiled = train(f"{line} --compile", tmp_path / "compiled")
    # Other roundings, which three steps multiply; of single layers see test_compile.py.
    assert compiled["test_loss"] == pytest.approx(plain["test_loss"], rel=1e-4)
    states = [tmp_path / name / "checkpoint.pth.tar" for name in ("plain", "compiled")]
    plain, compiled = (load_checkpoint(path)["model"] for path in states)
    assert plain.keys() == compiled.keys()  # a compiled network is continued as a plain one


def test_sync_stats_false_reaches_every_layer_that_whitens():
    line = "--dataset digits --arch simple_v2 --deconv True --sync-stats False"
    flags, _ = read_settings(main.build_script(), line.split())
    spec = DataSpec("digits", 1, 32, tuple("0123456789"), (0.5,), (0.5,))
    layers = [m for m in main.build_network(flags, spec).modules() if hasattr(m, "sync_stats")]
    assert len(layers) > 1 and not any(layer.sync_stats for layer in layers)


def test_processes_average_their_running_statistics_before_every_test(tmp_path, monkeypatch):
    """As they must with BatchNorm, and with --sync-stats False: each has seen its share only."""
    calls = []
    average, test = World.average_buffers, trainer.evaluate
    record = lambda action: lambda *args, **more: (calls.append(action), action(*args, **more))[1]
    monkeypatch.setattr(World, "average_buffers", record(average))
    monkeypatch.setattr(trainer, "evaluate", record(test))
    train(f"--arch mlp --epochs 2 --batch-size 1437 {QUIET}", tmp_path / "run")
    assert calls == [average, test] * 2


@pytest.mark.slow
@pytest.mark.parametrize("line", ["--compile", "--amp fp16"])
def test_slow_ways_to_compute_learn_as_well(tmp_path, line):
    assert train(f"--deconv True --epochs 2 {line} {QUIET}", tmp_path / "run")["test_top1"] > 90


@pytest.mark.slow
def test_bf16_trains_vgg11_to_the_accuracy_of_float32(tmp_path):
    line = f"--arch vgg11 --deconv True --epochs 3 --lr .05 {QUIET}"
    float32 = train(line, tmp_path / "float32")["test_top1"]
    assert float32 > 95
    assert train(f"{line} --amp bf16", tmp_path / "bf16")["test_top1"] > float32 - 1.5


@pytest.mark.parametrize("method", [1, 2, 3, 4])
@pytest.mark.parametrize("loss", ["CE", "L2"])
def test_linear_models_learn_by_every_method(tmp_path, method, loss):
    line = f"--arch simple_v1 --method {method} --loss {loss} --max-steps 4 --lr .01 {QUIET}"
    summary = train(line, tmp_path / "run")
    assert summary["kind"] == f"method{method}"
    assert math.isfinite(summary["train_loss"])


@pytest.mark.parametrize(
    "line",
    [
        "--arch vgg11 --deconv True --batch-size 4 --dropout-rate .2",
        "--arch vgg11 --batch-size 4 --optimizer Adam --lr 1e-3",
        "--arch mlp --method 4 --optimizer AMSGrad",
        "--arch resnet18 --batch-size 4 --lr-scheduler multistep --milestone .5",
        "--batchnorm False --num-groups-final 64",
        "--deconv True --layout interleaved --share-blocks True --image-size 40",
    ],
)
def test_two_steps_of_other_combinations(tmp_path, line):
    summary = train(f"{line} --max-steps 2 --lr .001 {QUIET}", tmp_path / "run")
    assert summary["steps"] == 2


def test_a_run_leaves_its_files(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= FILES | {"checkpoint_1.pth.tar", "checkpoint_2.pth.tar"}
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.endswith(".tmp") for name in names)


def test_logs_are_tables(finished):
    for name, first, rows in (
        ("train.log", ["epoch"], 2),
        ("test.log", ["epoch"], 2),
        ("train_batch.log", ["epoch", "batch"], 4),  # 24 steps, every fifth
    ):
        header, *lines = (finished / name).read_text().splitlines()
        assert header.split("\t") == [*first, "loss", "top1", "top5", "lr", "seconds"]
        assert len(lines) == rows
        assert all(len(line.split("\t")) == len(header.split("\t")) for line in lines)


def test_summary_and_record_tell_the_run(finished):
    summary = json.loads((finished / "summary.json").read_text())
    record = json.loads((finished / "args.json").read_text())
    assert {
        *("best_test_top1", "test_top1", "test_top5", "test_loss", "epochs", "steps"),
        *("train_seconds", "test_seconds", "parameters", "images_per_second", "peak_memory_mb"),
        *("kind", "arch", "dataset", "seed", "train_loss", "train_top1"),
    } <= set(summary)
    assert (summary["epochs"], summary["steps"], summary["kind"]) == (2, 24, "deconv-mode5")
    assert record["flags"]["num_groups_final"] == 512
    assert record["flags"]["batch_size"] == 128
    chosen = {name: record["flags"][name] for name in ("layout", "share_blocks", "image_size")}
    assert chosen == {"layout": "interleaved", "share_blocks": True, "image_size": 32}


def test_held_out_images_choose_the_best_epoch_also_after_a_stop(tmp_path, capsys):
    line = f"--val-split 0.2 --lr .02 --epochs 3 --checkpoint-epoch 1 {QUIET}"
    summary = train(line, tmp_path / "whole")
    told = capsys.readouterr().out
    assert " training, 287 validation and 360 test images" in told and "--val-split" not in told
    val, test = (read_log(tmp_path / "whole" / f"{part}.log") for part in ("val", "test"))
    best = val["top1"].index(max(val["top1"]))
    assert summary["best_epoch"] == best + 1
    assert summary["best_val_top1"] == pytest.approx(val["top1"][best], abs=1e-3)
    assert summary["best_test_top1"] == pytest.approx(test["top1"][best], abs=1e-3)
    chosen = load_checkpoint(tmp_path / "whole" / "model_best.pth.tar")
    assert (chosen["epoch"], chosen["config"]["val_split"]) == (best + 1, 0.2)
    second = tmp_path / "whole" / "checkpoint_2.pth.tar"
    main.main(["--resume", str(second), "--run-dir", str(tmp_path / "part")])
    for name in ("val.log", "test.log"):
        logs = [read_log(tmp_path / run / name) for run in ("whole", "part")]
        assert all(logs[0][key] == logs[1][key] for key in ("epoch", "loss", "top1"))
    wrong = ["--resume", tmp_path / "part", "--val-split", 0.1, "--epochs", 4]
    assert "--val-split is 0.2 in the checkpoint, 0.1 in this run" in refusal(capsys, wrong)
    main.main(["-e", "--resume", str(tmp_path / "part")])
    assert "360 images" in capsys.readouterr().out


def test_without_held_out_images_the_choice_on_test_images_is_said(tmp_path, capsys):
    train(f"--max-steps 1 --lr .001 {QUIET}", tmp_path / "run")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "--val-split" in line]
    assert line.startswith("model_best.pth.tar is chosen on the test images")


def test_checkpoint_is_tensors_and_plain_values(finished):
    saved = torch.load(finished / "checkpoint.pth.tar", weights_only=True)
    assert (saved["epoch"], saved["step"]) == (2, 24)
    assert saved["config"]["arch"] == "simple_v2"


def test_default_folder_is_named_by_data_network_and_layers(tmp_path, capsys):
    for line, name in (
        ("", "digits-simple_v2-bn"),
        ("--deconv True --mode 3", "digits-simple_v2-deconv-mode3"),
        ("--batchnorm False", "digits-simple_v2-plain"),
        ("--arch mlp --method 2", "digits-mlp-method2"),
    ):
        train(f"--max-steps 1 --lr .001 {QUIET} --out {tmp_path} {line}")
        (run_dir,) = (tmp_path / name).iterdir()
        assert str(run_dir) in capsys.readouterr().out


def test_console_has_a_line_per_epoch_and_with_msg_one_per_batch(tmp_path, capsys):
    train(f"--epochs 1 --msg True {QUIET}", tmp_path / "run")
    out, err = capsys.readouterr()
    assert len([line for line in out.splitlines() if line.startswith("epoch 1 batch ")]) == 12
    assert len([line for line in out.splitlines() if line.startswith("epoch 1/1 ")]) == 1
    assert err == ""  # no bar where there is no terminal


def test_a_run_in_a_thread_takes_no_signals(tmp_path):
    """Python refuses signal handlers outside the main thread."""
    line = f"--dataset digits --arch simple_v2 --max-steps 1 -j 1 {QUIET} --run-dir {tmp_path}"
    thread = threading.Thread(target=main.main, args=(line.split(),))
    thread.start()
    thread.join()
    assert (tmp_path / "summary.json").exists()


def test_same_seed_same_result_and_another_seed_another(tmp_path):
    line = f"--deconv True --batch-size 32 --max-steps 2 {QUIET}"
    runs = [train(f"{line} --seed {s}", tmp_path / f"{i}") for i, s in enumerate((1, 1, 2))]
    assert runs[0]["train_loss"] == runs[1]["train_loss"] != runs[2]["train_loss"]


@pytest.fixture
def any_algorithms_afterwards(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    choose_algorithms(False)


def test_deterministic_runs_use_operations_that_are(tmp_path, any_algorithms_afterwards):
    line = f"--deconv True --batch-size 32 --max-steps 2 --threads 1 {QUIET}"
    figures = train(f"{line} --deterministic", tmp_path / "one")
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert train(line, tmp_path / "two")["test_loss"] == figures["test_loss"]  # on a CPU
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_that_cannot_be_deterministic_is_named(
    tmp_path, capsys, monkeypatch, any_algorithms_afterwards
):
    scatter = lambda *args: torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    monkeypatch.setattr(Recorder, "batch", scatter)
    argv = ["--dataset", "digits", "--arch", "simple_v1", *QUIET.split(), "--deterministic"]
    told = refusal(capsys, [*argv, "--run-dir", tmp_path / "run"])
    assert told.startswith("main.py: error: --deterministic: put_ has no deterministic")


def rows(path):
    """A log without the column of the seconds."""
    table = [line.split("\t") for line in path.read_text().splitlines()]
    seconds = table[0].index("seconds")
    return [row[:seconds] + row[seconds + 1 :] for row in table]


@pytest.mark.parametrize(
    "line",
    [
        "--deconv True --dropout-rate .3",
        "--arch mlp --method 1 --optimizer Adam --lr .01 --lr-scheduler multistep --milestone 1",
        "--arch mlp --method 3 --optimizer AdamW --accum-steps 3 --clip-grad 1 "
        "--label-smoothing .1 --auto-augment ta_wide --random-erase .5 --mixup .2 --cutmix 1",
        "--arch mlp --method 1 --optimizer Muon --no-decay-norm-bias --ema .7",
    ],
)
def test_resume_is_bit_equal_to_the_uninterrupted_run(tmp_path, line):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(f"{line} --epochs 3 {QUIET} --checkpoint-epoch 2 --print-freq 4", whole)
    parts.mkdir()
    for name in ("args.json", "train.log", "test.log", "train_batch.log"):
        (parts / name).write_bytes((whole / name).read_bytes())
    (whole / "checkpoint_2.pth.tar").rename(parts / "checkpoint.pth.tar")
    main.main(["--resume", str(parts / "checkpoint.pth.tar")])
    a, b = (load_checkpoint(folder / "checkpoint.pth.tar") for folder in (whole, parts))
    for part in ("model", "ema", "optimizer", "rng", "epoch", "step", "best_top1"):
        assert repr(flatten(a.get(part))) == repr(flatten(b.get(part))), part
    assert ("ema" in a) == ("--ema" in line)
    for name in ("train.log", "test.log", "train_batch.log"):
        assert rows(whole / name) == rows(parts / name)


def flatten(value):
    """Nested values with every tensor written out in full."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: flatten(item) for key, item in value.items()}
    return [flatten(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_the_first_layer_of_airbench_is_made_from_images_once_and_stays(tmp_path, monkeypatch):
    train(f"--arch airbench --batch-size 32 --epochs 1 --max-steps 2 {QUIET}", tmp_path)
    filters = load_checkpoint(tmp_path / "checkpoint.pth.tar")["model"]["stem.0.weight"]
    assert torch.equal(filters[4:], -filters[:4])  # random filters have no such pairs
    monkeypatch.setattr(main, "init_from_images", None)
    for words in (["-e"], []):
        main.main([*words, "--resume", str(tmp_path)])


def test_resume_goes_on_to_more_epochs_on_the_new_totals_schedule(finished, tmp_path):
    checkpoint = finished / "checkpoint_1.pth.tar"
    argv = ["--resume", checkpoint, "--epochs", "3", "--run-dir", tmp_path / "more", *QUIET.split()]
    main.main([str(word) for word in argv])
    rates = [float(row[-1]) for row in rows(tmp_path / "more" / "train.log")[1:]]
    cosine = [0.05 * (1 + math.cos(math.pi * step / 36)) for step in (23, 35)]
    assert rates[1:] == pytest.approx(cosine, rel=1e-4)
    assert json.loads((tmp_path / "more" / "summary.json").read_text())["epochs"] == 3
    old, new = (rows(folder / "train_batch.log") for folder in (finished, tmp_path / "more"))
    assert new[:3] == old[:3] and len(new) == 8  # the header and every fifth step


def test_resuming_a_finished_run_changes_nothing(finished, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    main.main(["--resume", str(finished / "checkpoint.pth.tar")])
    assert "finished" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--arch vgg11", "--arch is 'simple_v2' in the checkpoint, 'vgg11' in this run"),
        ("--mode 3", "--mode is 5 in the checkpoint, 3 in this run"),
        ("--lr .05", "--lr is 0.1 in the checkpoint, 0.05 in this run"),
        ("--block 8", "--block is 16 in the checkpoint, 8 in this run"),
        ("--seed 3", "--seed is 0 in the checkpoint, 3 in this run"),
    ],
)
def test_resume_refuses_another_run_naming_the_difference(finished, capsys, flags, told):
    assert told in refusal(
        capsys, ["--resume", finished / "checkpoint.pth.tar", "--epochs", 9, *flags.split()]
    )


def test_resume_refuses_what_is_no_checkpoint(finished, tmp_path, capsys):
    run_dir = ["--run-dir", tmp_path / "run"]
    missing = tmp_path / "nothing.pth.tar"
    assert str(missing) in refusal(capsys, ["--resume", missing, *run_dir])
    foreign = tmp_path / "foreign.pth.tar"
    torch.save({"state_dict": {}}, foreign)
    assert str(foreign) in refusal(capsys, ["--resume", foreign, *run_dir])
    damaged = tmp_path / "damaged.pth.tar"
    damaged.write_bytes((finished / "checkpoint.pth.tar").read_bytes()[:-100])
    assert str(damaged) in refusal(capsys, ["--resume", damaged, *run_dir])
    assert not (tmp_path / "run").exists()


def test_a_run_that_max_steps_ended_continues_as_if_it_had_never_ended(tmp_path, capsys):
    """Neither the test at its end nor the second start leave a trace in weights and logs."""
    line = f"--arch mlp --method 2 --dropout-rate .3 --epochs 2 --lr-scheduler step {QUIET} -p 4"
    line += " --ema .9"
    train(line, tmp_path / "whole")
    train(f"{line} --max-steps 18", tmp_path / "parts")
    for flags, place in (
        (["--max-steps", "22"], "step 18 of 22, in epoch 2; the step schedule now spans 22 steps"),
        ([], "step 22 of 24, in epoch 2; the step schedule now spans 24 steps instead of 22"),
    ):
        capsys.readouterr()
        main.main(["--resume", str(tmp_path / "parts"), *flags])
        told = f"resuming from {tmp_path / 'parts' / 'checkpoint.pth.tar'}, {place}"
        assert told in capsys.readouterr().out
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("whole", "parts"))
    for part in ("model", "optimizer", "rng", "epoch", "step", "progress"):
        times = ("seconds", "best") if part == "progress" else ()
        a[part], b[part] = (drop(state[part], times) for state in (a, b))
        assert repr(flatten(a[part])) == repr(flatten(b[part])), part
    for name in ("train.log", "test.log", "train_batch.log"):
        assert rows(tmp_path / "whole" / name) == rows(tmp_path / "parts" / name)


def drop(value, words):
    """Return a dict without the keys that contain one of the words."""
    return (
        value if not words else {k: v for k, v in value.items() if not any(w in k for w in words)}
    )


def test_the_best_network_stays_though_its_cut_epoch_ends_worse(tmp_path):
    """At a rate of 30 in place of 0.01, the rest of the epoch ruins the network."""
    train(f"--arch simple_v1 --lr .01 --max-steps 11 {QUIET}", tmp_path / "run")
    best = load_checkpoint(tmp_path / "run" / "model_best.pth.tar")
    latest = tmp_path / "run" / "checkpoint.pth.tar"
    state = load_checkpoint(latest)
    state["config"]["lr"] = 30.0
    save_checkpoint(state, tmp_path / "run")
    for epochs in ("1", "2"):
        main.main(["--resume", str(tmp_path / "run"), "--epochs", epochs])
        after = load_checkpoint(tmp_path / "run" / "model_best.pth.tar")
        assert load_checkpoint(latest)["history"]["test_top1"][0] < best["best_top1"] - 20
        assert after["step"] == 11 and after["best_top1"] == best["best_top1"]


def test_an_earlier_checkpoint_replaces_no_later_one(finished, tmp_path, capsys):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    earlier = folder / "checkpoint_1.pth.tar"
    told = refusal(capsys, ["--resume", earlier, "--epochs", 3])
    assert f"--resume {earlier}: is of step 12 and would replace {folder}/checkpoint.pth" in told
    assert f"of step 24; continue from there with --resume {folder}, or branch off with" in told
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_checkpoints_of_the_last_epochs_are_kept(tmp_path, monkeypatch):
    line = f"--arch simple_v1 --lr .01 --batch-size 1437 {QUIET} --checkpoint-hist 2"

    def numbers(name):
        names = (path.name for path in (tmp_path / name).glob("checkpoint_*[0-9].pth.tar"))
        return sorted(int(re.findall(r"\d+", name)[0]) for name in names)

    train(f"{line} --epochs 3", tmp_path / "run")
    assert numbers("run") == [2, 3]
    train(f"{line} --epochs 4 --checkpoint-epoch 2", tmp_path / "both")
    assert numbers("both") == [2, 3, 4]
    save = recorder_module.save_checkpoint

    def refuse(state, folder, *, filename="checkpoint.pth.tar", **more):
        if filename == "checkpoint_4.pth.tar":
            raise OSError(errno.ENOSPC, "No space left on device", filename)
        return save(state, folder, filename=filename, **more)

    monkeypatch.setattr(recorder_module, "save_checkpoint", refuse)
    main.main(["--resume", str(tmp_path / "run"), "--epochs", "4"])
    assert numbers("run") == [2, 3]  # an old one goes only when a new one has come


def test_more_epochs_are_not_cut_short_by_the_steps_asked_for_before(tmp_path):
    train(f"--arch simple_v1 --lr .01 --max-steps 12 {QUIET}", tmp_path / "run")
    main.main(["--resume", str(tmp_path / "run" / "checkpoint.pth.tar"), "--epochs", "2"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 24


def test_a_run_goes_on_with_the_threads_it_had(tmp_path, monkeypatch):
    """Other threads add in another order, and would not be bit-equal."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    train(f"--max-steps 12 --threads 3 {QUIET}", tmp_path / "run")
    flags, _ = read_settings(main.build_script(), ["--resume", str(tmp_path / "run")])
    assert flags.threads == 3


def test_a_checkpoint_is_found_from_home_and_may_lack_newer_flags(tmp_path, monkeypatch, capsys):
    train(f"--arch simple_v1 --epochs 1 {QUIET}", tmp_path / "run")
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")
    del saved["config"]["stem_iter"]
    torch.save(saved, tmp_path / "older.pth.tar")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~/older.pth.tar", "~/run"):  # a file, or the folder of a run
        main.main(["--resume", path])
        assert "is finished" in capsys.readouterr().out


def test_a_finished_run_with_an_average_says_so_where_fewer_steps_are_asked_for(tmp_path, capsys):
    train(f"--arch simple_v1 --ema .8 --max-steps 6 {QUIET}", tmp_path / "run")
    main.main(["--resume", str(tmp_path / "run"), "--max-steps", "4"])
    assert "is finished: 6 of 4 steps" in capsys.readouterr().out


def test_each_epoch_has_an_order_of_its_own(tmp_path, monkeypatch):
    orders = []
    draw = EpochBatches.__iter__

    def record(sampler):
        batches = list(draw(sampler))
        if sampler.train:
            orders.append([key for batch in batches for key in batch])
        return iter(batches)

    monkeypatch.setattr(EpochBatches, "__iter__", record)
    train(f"--arch simple_v1 --epochs 2 --lr .01 {QUIET}", tmp_path / "run")
    assert [{epoch for epoch, *_ in keys} for keys in orders] == [{1}, {2}]


def test_a_single_image_at_the_end_of_an_epoch_is_refused_for_batchnorm1d(tmp_path, capsys):
    argv = ["--dataset", "digits", "--arch", "mlp", "--run-dir", tmp_path / "run"]
    assert "--batch-size 1: the last batch" in refusal(capsys, [*argv, "--batch-size", 1])
    assert not (tmp_path / "run").exists()


def test_faults_of_the_file_system_are_one_line(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    argv = ["--dataset", "digits", "--arch", "simple_v1", "--max-steps", 1, *QUIET.split()]
    assert str(file) in refusal(capsys, [*argv, "--out", file])
    assert str(file) in refusal(capsys, [*argv, "--run-dir", file / "run"])
    (tmp_path / "run" / "train.log").mkdir(parents=True)  # stands in the log's place
    assert "train.log" in refusal(capsys, [*argv, "--run-dir", tmp_path / "run"])


def test_a_folder_that_holds_a_run_is_refused(finished, capsys):
    told = refusal(capsys, ["--dataset", "digits", "--run-dir", finished])
    assert str(finished) in told and "--resume" in told


def test_bad_input_creates_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    told = refusal(capsys, ["--dataset", "folder", "--data", empty])
    assert str(empty) in told
    refusal(capsys, ["--dataset", "digits", "--lr", "-1"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "--use-gpu True" in refusal(capsys, ["--dataset", "digits", "--use-gpu", "True"])
    assert list(tmp_path.rglob("*")) == [empty]


def test_folders_whose_classes_differ_are_refused(tmp_path, capsys):
    for name in ("train/cat", "train/dog", "test/cat", "test/cow"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name / "1.png")
    told = refusal(
        capsys, ["--dataset", "folder", "--data", tmp_path, "--run-dir", tmp_path / "run"]
    )
    assert "dog" in told or "cow" in told
    assert not (tmp_path / "run").exists()


def test_a_folder_of_images_is_trained_and_tested_on(tmp_path, capsys):
    torch.manual_seed(0)
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(4):
            pixels = (torch.rand(40, 30, 3) * 255).to(torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    before = sorted(path for path in tmp_path.rglob("*"))
    line = f"--dataset folder --data {tmp_path} --batch-size 4 --epochs 1 {QUIET}"
    summary = train(line, tmp_path / "runs" / "run")
    assert summary["steps"] == 2
    assert [p for p in sorted(tmp_path.rglob("*")) if "runs" not in p.parts] == before
    (tmp_path / "train").rename(tmp_path / "gone")
    for data in (tmp_path / "val", tmp_path):  # the same images
        capsys.readouterr()
        words = f"-e --per-class --resume {tmp_path / 'runs' / 'run'} --data {data} --use-gpu False"
        main.main(words.split())
        assert f"test loss {summary['test_loss']:.4f}" in capsys.readouterr().out
    assert (tmp_path / "runs" / "run" / "confusion_matrix.csv").exists()


def test_a_run_that_would_end_before_it_starts_is_refused(tmp_path, capsys):
    argv = ["--dataset", "digits", "--arch", "simple_v1", "--run-dir", tmp_path / "run"]
    told = refusal(capsys, [*argv, "--start-epoch", 2, "--max-steps", 3])
    assert "--start-epoch 2: its 6 steps are not before the end, --max-steps 3" in told
    assert not (tmp_path / "run").exists()


def test_divergence_is_an_error_that_names_the_step(tmp_path, capsys):
    line = f"--dataset digits --arch simple_v2 --batchnorm False --lr 1e30 {QUIET}"
    told = refusal(capsys, [*line.split(), "--run-dir", tmp_path / "run"], code=1)
    assert "epoch 1/100, batch" in told and "--lr" in told


def test_command_line_exits_with_two_and_one_line(tmp_path):
    script = [sys.executable, str(ROOT / "main.py"), "--dataset", "digits", "--mode", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    end = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert end.returncode == 2
    assert end.stderr == "main.py: error: --mode 3 needs --deconv True\n"
    assert not list(tmp_path.iterdir())
