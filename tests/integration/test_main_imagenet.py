"""Whole runs of main_imagenet.py on small images made here."""

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import main_imagenet
from models import IMAGENET_ARCHITECTURES, build_imagenet_model, make_layers
from util.checkpoint.store import load_checkpoint
from util.cli.settings import read_settings
from util.distributed.world import World
from util.training.recorder import Recorder

SMALL = "--image-size 32 --batch-size 4 -j 0 --use-gpu False --tensorboardX False --save-plot False"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of eight images each, bright and dark, and half as many to test with."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, low in (("dark", 0), ("bright", 128)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(low, low + 128, (50, 40, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def run(line, *more):
    main_imagenet.main([*SMALL.split(), *line.split(), *map(str, more)])


def summary(run_dir):
    return json.loads((run_dir / "summary.json").read_text())


def refusal(capsys, line, *more):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(line, *more)
    assert stop.value.code == 2
    (text,) = capsys.readouterr().err.splitlines()
    assert text.startswith("main_imagenet.py: error: ")
    return text


def read(line):
    return read_settings(main_imagenet.build_script(), line.split())[0]


@pytest.mark.parametrize(
    "line",
    [
        "-a resnet18",
        "-a resnet18d --deconv True",
        "-a resnet18 --deconv True --label-smoothing .5 --auto-augment augmix --random-erase .5 "
        "--mixup .2 --cutmix 1",
        "-a timm/mobilenetv3_small_050 --deconv True",
    ],
)
def test_training_testing_and_resuming(images, tmp_path, capsys, line):
    if "timm" in line:
        pytest.importorskip("timm")
    checkpoint = tmp_path / "run" / "checkpoint.pth.tar"
    run(f"{line} --epochs 2 --lr .01 --run-dir {tmp_path / 'run'}", images)
    figures = summary(tmp_path / "run")
    assert (figures["epochs"], figures["steps"]) == (2, 8)
    capsys.readouterr()
    run(f"-e --resume {checkpoint}", images)
    said = capsys.readouterr().out
    assert f"test loss {figures['test_loss']:.4f} top1 {figures['test_top1']:.2f}%" in said
    assert "8 images" in said
    run(f"-e --resume {checkpoint} --test-run True --test-iter 1 --batch-size 8", images)
    assert "8 images" in capsys.readouterr().out
    run(f"-e --resume {checkpoint} --test-run True --test-iter 1 --lr 5", images)
    assert "4 images" in capsys.readouterr().out
    run(f"--resume {checkpoint} --epochs 3", images)
    assert summary(tmp_path / "run")["epochs"] == 3
    state = load_checkpoint(checkpoint)["model"]
    whitened = any(name.endswith("running_cov_joint") for name in state)
    assert whitened == ("deconv" in line)


def test_pretrained_weights_are_calibrated_at_the_start_and_not_again(
    tmp_path, capsys, monkeypatch
):
    theirs = torchvision.models.resnet18()
    for _ in range(2):
        theirs(torch.randn(8, 3, 32, 32))
    weights = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: theirs.state_dict())
    line = f"--dummy --test-run True --test-iter 2 --lr .01 --run-dir {tmp_path / 'run'}"
    said = "pretrained weights calibrated on 10 training batches"
    run(f"{line} --pretrained --deconv True --epochs 1")
    assert capsys.readouterr().out.count(said) == 1
    run(f"{line} --pretrained --deconv True --epochs 2 --resume auto")
    assert summary(tmp_path / "run")["epochs"] == 2
    with pytest.raises(SystemExit):
        run(f"{line} --pretrained False --epochs 3 --resume auto")
    output, errors = capsys.readouterr()
    assert said not in output and "pretrained" in errors
    run("--dummy --test-run True --test-iter 1 --pretrained --deconv True -e")
    assert said not in capsys.readouterr().out


def test_pretrained_weights_are_tuned_on_any_number_of_classes(
    images, tmp_path, capsys, monkeypatch
):
    theirs = torchvision.models.resnet18()
    weights = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: theirs.state_dict())
    line = f"--pretrained --deconv True --epochs 1 --lr .01 --run-dir {tmp_path / 'run'}"
    run(line, images)
    said = "last layer, which is new: 2 classes instead of 1000\npretrained weights calibrated on"
    assert said in capsys.readouterr().out
    assert (
        load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["model"]["fc.weight"].shape[0] == 2
    )
    told = "-e --pretrained: the weights have 1000 classes, the images 2; train without -e first"
    assert told in refusal(capsys, "-e --pretrained", images)
    monkeypatch.delattr(weights, "get_state_dict")  # the file is not needed again
    run(f"--resume {tmp_path / 'run'} --epochs 2", images)
    assert summary(tmp_path / "run")["epochs"] == 2


def test_a_test_is_compiled_where_asked(images, tmp_path, monkeypatch):
    run(f"--max-steps 1 --lr .01 --epochs 1 --run-dir {tmp_path / 'run'}", images)
    translated = []
    monkeypatch.setattr(torch, "compile", lambda model: translated.append(model) or model)
    run(f"-e --resume {tmp_path / 'run'} --compile", images)
    assert len(translated) == 1


def test_images_and_weights_are_fetched_by_the_first_process_for_all(tmp_path, monkeypatch):
    actions, whole = [], World.rank0_first

    def record(world, action):
        actions.append(action.func)
        return whole(world, action)

    monkeypatch.setattr(World, "rank0_first", record)
    run(f"--dummy --test-run True --test-iter 1 --epochs 1 --lr .01 --run-dir {tmp_path / 'run'}")
    assert actions == [main_imagenet.load_images, main_imagenet.build_network]


def test_testing_needs_no_folder_to_train_on_and_writes_nothing(images, tmp_path, capsys):
    run(f"--max-steps 1 --lr .01 --epochs 1 --run-dir {tmp_path / 'run'}", images)
    (tmp_path / "val").symlink_to(images / "val")
    before = set(tmp_path.rglob("*"))
    run(f"-e --resume {tmp_path / 'run' / 'checkpoint.pth.tar'}", tmp_path)
    assert "8 images" in capsys.readouterr().out
    run(f"-e --resume {tmp_path / 'run'}", images / "val")
    assert "8 images" in capsys.readouterr().out
    assert set(tmp_path.rglob("*")) == before


def test_other_images_are_tested_class_by_class(images, tmp_path, capsys):
    run(f"--max-steps 1 --lr .01 --epochs 1 --run-dir {tmp_path / 'run'}", images)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "dark").symlink_to(images / "val" / "dark")
    capsys.readouterr()
    run(f"-e --per-class --resume {tmp_path / 'run'}", tmp_path / "new")
    output = capsys.readouterr().out
    assert f"{tmp_path / 'new'}: no images of 1 of 2 classes: bright" in output
    (overall,) = re.findall(r"top1 (\S+)%.* 4 images", output)
    assert re.search(rf"^dark +{overall}% +4$", output, re.MULTILINE)
    written = sorted(path.name for path in (tmp_path / "run").glob("confusion*"))
    assert written == ["confusion_matrix.csv", "confusion_matrix.png"]
    (tmp_path / "new" / "zebra").mkdir()
    told = refusal(capsys, f"-e --resume {tmp_path / 'run'}", tmp_path / "new")
    assert f"{tmp_path / 'new' / 'zebra'}: it knows bright, dark" in told


def test_images_lost_since_the_checkpoint_are_refused_by_their_number(images, tmp_path, capsys):
    run(f"--max-steps 2 --lr .01 --epochs 1 --run-dir {tmp_path / 'run'}", images)
    data = shutil.copytree(images, tmp_path / "data")
    before = len(list(data.glob("train/*/*.png")))
    next(data.glob("train/*/*.png")).unlink()
    told = f"number of training images is {before} in the checkpoint, {before - 1} in this run"
    assert told in refusal(capsys, f"--resume {tmp_path / 'run'} --epochs 2", data)


def test_bad_images_end_the_run_or_are_listed(images, tmp_path, capsys):
    data = tmp_path / "data"
    for split in ("train", "val"):
        for name in ("dark", "bright"):
            (data / split / name).mkdir(parents=True)
            (data / split / name / "0.png").symlink_to(images / split / name / "0.png")
    (data / "train" / "dark" / "empty.jpg").touch()
    line = f"--epochs 1 --lr .01 --run-dir {tmp_path / 'run'}"
    told = refusal(capsys, line, data)
    assert "empty.jpg" in told and "--on-bad-image skip leaves such images out" in told
    run(f"{line} --on-bad-image skip", data)
    assert (tmp_path / "run" / "skipped.txt").read_text().splitlines() == [
        str(data / "train" / "dark" / "empty.jpg")
    ]
    assert "skipped 1 bad images" in capsys.readouterr().out


def test_bad_images_met_before_a_stop_are_listed_at_the_end(images, tmp_path, monkeypatch):
    data = shutil.copytree(images, tmp_path / "data")
    bad = data / "train" / "dark" / "0.png"
    bad.write_bytes(b"")
    line = f"--lr .01 --epochs 1 --on-bad-image skip --run-dir {tmp_path / 'run'}"
    batch = Recorder.batch

    def stop_before_the_last(recorder, number, now):
        batch(recorder, number, now)
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "batch", stop_before_the_last)
    with pytest.raises(SystemExit):
        run(line, data)
    assert not (tmp_path / "run" / "skipped.txt").exists()
    run(f"--resume {tmp_path / 'run'}", data)
    assert (tmp_path / "run" / "skipped.txt").read_text() == f"{bad}\n"


def test_noise_serves_for_timing(tmp_path):
    line = "-a resnet18d --deconv True --mode 3 --dummy --test-run True --test-iter 2 --epochs 2"
    run(f"{line} --lr 1e-3 --run-dir {tmp_path / 'run'}")
    figures = summary(tmp_path / "run")
    assert (figures["epochs"], figures["steps"]) == (2, 4)
    rows = (tmp_path / "run" / "test.log").read_text().splitlines()
    assert len(rows) == 3


def test_speed_is_switched_as_in_the_other_script(tmp_path):
    switches = {"amp": "bf16", "channels_last": True, "warmup_epochs": 0.5}
    line = "-a resnet18d --dummy --test-run True --test-iter 1 --epochs 1 --lr 1e-3"
    run(f"{line} --amp bf16 --channels-last --warmup-epochs .5 --run-dir {tmp_path / 'run'}")
    flags = json.loads((tmp_path / "run" / "args.json").read_text())["flags"]
    assert {name: flags[name] for name in switches} == switches
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["model"]
    weights = [value for value in state.values() if value.dim() == 4 and value[0, 0].numel() > 1]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_epochs_can_be_counted_from_later_on(images, tmp_path):
    line = "--epochs 4 --start-epoch 3 --lr .01 --lr-scheduler step --scheduler-step-size 2"
    run(f"{line} --run-dir {tmp_path / 'run'}", images)
    figures = summary(tmp_path / "run")
    assert (figures["epochs"], figures["train_lr"]) == (4, pytest.approx(1e-3))
    (row,) = (tmp_path / "run" / "train.log").read_text().splitlines()[1:]
    assert row.startswith("4\t")


def test_a_single_image_in_the_last_batch_is_refused_before_a_run_with_batchnorm(
    images, tmp_path, capsys
):
    line = f"--batch-size 3 --epochs 1 --run-dir {tmp_path / 'run'}"  # 16 images: one is left
    assert "a single image is too few for BatchNorm2d" in refusal(capsys, line, images)
    assert not (tmp_path / "run").exists()


def test_defaults_are_the_published_ones():
    flags = vars(read("DIR"))
    expected = {"arch": "resnet18", "epochs": 90, "batch_size": 256, "lr": 0.1, "image_size": 224}
    expected |= {"weight_decay": 1e-4, "num_groups_final": 0, "lr_scheduler": "cosine"}
    assert {name: flags[name] for name in expected} == expected
    assert read("DIR -a resnet18d --deconv True").num_groups_final == 32
    assert read("DIR -a resnet18 --deconv True").num_groups_final == 32


@pytest.mark.parametrize(
    "line",
    [
        "-a resnet18 -j 32 DIR",
        "-a resnet18d -j 32 DIR --deconv True",
        "-a vgg11d -j 32 DIR --deconv True --lr 0.01",
        "-a densenet121d -j 32 DIR --deconv True",
        "-a resnet50 --pretrained -e DIR",
        "-a resnet18 --multiprocessing-distributed --dist-url tcp://10.0.0.1:23456 --dist-backend "
        "nccl --world-size 2 --rank 1 -p 100 --seed 3 --lr-scheduler multistep --milestone .4 DIR",
        "-a resnet50 --dist-url tcp://127.0.0.1:5432 --dist-backend nccl "
        "--multiprocessing-distributed --world-size 1 --rank 0 DIR",
    ],
)
def test_published_commands_are_accepted(line):
    assert read(line).data == "DIR"


@pytest.mark.parametrize("flag", ["compile", "channels_last"])
def test_a_folder_after_a_flag_without_a_value_is_no_value(flag):
    word = f"--{flag.replace('_', '-')}"
    for line, value in ((f"{word} DIR", True), (f"{word} False DIR", False), (f"DIR {word}", True)):
        flags = vars(read(line))
        assert (flags[flag], flags["data"]) == (value, "DIR")


def test_a_folder_after_milestones_is_no_milestone():
    flags = read("--lr-scheduler multistep --milestone 30 60 DIR --epochs 80")
    assert (flags.milestone, flags.data) == ([30, 60], "DIR")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            "-a resnet18 --batchnorm False DIR",
            "--batchnorm False without --deconv True does not apply to resnet18.*resnet18d",
        ),
        ("-a vit_b_16 --num-groups-final 8 DIR", "--num-groups-final 8 without .* vit_b_16"),
        ("-a timm/resnet19x --dummy", "--arch timm/resnet19x: timm has no 'resnet19x'"),
        ("-a resnet18d --pretrained DIR", "--pretrained does not apply to resnet18d"),
        ("-e DIR", "-e needs --resume RUN or --pretrained"),
        ("--per-class DIR", "--per-class needs -e --resume RUN"),
        ("-e --pretrained --per-class DIR", "--per-class needs -e --resume RUN"),
        (
            "-a resnet18 --pretrained --deconv True --norm-type l1norm DIR",
            "--norm-type l1norm contradicts --pretrained",
        ),
        (
            "-a resnet18 --pretrained --deconv True --bias False DIR",
            "--bias False contradicts --pretrained",
        ),
        ("--dummy DIR", "DIR DIR contradicts --dummy"),
        ("--test-iter 3 DIR", "--test-iter 3 needs --test-run True"),
        ("--rank 1 DIR", "--rank 1 must be below --world-size 1"),
        ("--world-size 2 DIR", "--world-size 2 needs --rank and --dist-url"),
        (
            "--world-size 2 --rank 0 --dist-url env:// DIR",
            "--dist-url env:// needs MASTER_ADDR and MASTER_PORT",
        ),
        ("--dist-url tcp://nowhere DIR", "--dist-url: expected tcp://HOST:PORT or env://"),
        ("--gpu 0 --use-gpu False DIR", "--gpu 0 contradicts --use-gpu False"),
        ("--warmup-epochs 90 DIR", "--warmup-epochs 90.0 must be below --epochs 90"),
        ("", "DIR is missing"),
        ("/nowhere", "no folder /nowhere/train and no folder /nowhere/val or /nowhere/test"),
        ("-a resnet19 DIR", "'resnet19' is unknown"),
    ],
)
def test_contradictions_are_refused_by_name(capsys, line, reason):
    assert re.search(reason, refusal(capsys, line.replace("--use-gpu False ", "")))


def test_networks_of_timm_have_a_folder_for_their_runs(tmp_path):
    pytest.importorskip("timm")
    line = "-a timm/mobilenetv3_small_050 --dummy --test-run True --test-iter 1 --epochs 1 --lr .01"
    run(f"{line} --deconv True --out {tmp_path}")
    (folder,) = tmp_path.iterdir()
    assert folder.name == "imagenet-timm-mobilenetv3_small_050-deconv-mode5"


def test_no_batchnorm_is_left_with_deconvolution():
    for arch in ("resnet18d", "densenet121d", "vgg11d"):
        with torch.device("meta"):
            model = build_imagenet_model(arch, make_layers(deconv=True))
        norms = nn.BatchNorm1d | nn.BatchNorm2d
        assert not any(isinstance(module, norms) for module in model.modules())
    assert "resnet18" in IMAGENET_ARCHITECTURES
