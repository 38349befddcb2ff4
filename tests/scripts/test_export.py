"""Tests of scripts/export.py: the written file gives the scores of the network."""

import json
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import main
import main_imagenet
from scripts import export
from scripts.trained_network import read_images
from tests.pairwise import loop_over
from util.errors import DataError

FORMATS = ["onnx", "torch-export", "safetensors"]
LINE = "--use-gpu False --tensorboardX False --save-plot False --batch-size 8 --epochs 1 --lr .01"
PACKAGES = {"onnx": "onnxruntime", "safetensors": "safetensors"}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A network with convolutions and a Delinear, after three steps on digits."""
    folder = tmp_path_factory.mktemp("run")
    line = f"--dataset digits --arch simple_v2 --deconv True --max-steps 3 {LINE}"
    main.main([*line.split(), "--run-dir", str(folder / "run")])
    return folder / "run"


def export_to(kind, run_dir, out, *more):
    if kind in PACKAGES:
        pytest.importorskip(PACKAGES[kind])
        pytest.importorskip("onnxscript" if kind == "onnx" else kind)
    export.main([str(run_dir / "checkpoint.pth.tar"), "--to", kind, str(out), *more])


@pytest.mark.parametrize("kind", FORMATS)
def test_the_written_file_gives_the_scores_of_the_network(kind, run_dir, tmp_path, capsys):
    out = tmp_path / "new" / "network"
    export_to(kind, run_dir, out)
    line = capsys.readouterr().out
    values = re.search(
        r"over 32 images the largest difference is (\S+), of scores up to (\S+)$", line
    )
    difference, scale = map(float, values.groups())
    assert difference <= 1e-5 * scale and scale > 0
    assert [path.name for path in out.parent.iterdir()] == ["network"]


def test_safetensors_hold_plain_layers_and_facts_about_the_input(run_dir, tmp_path):
    export_to("safetensors", run_dir, tmp_path / "out")
    from safetensors import safe_open

    with safe_open(tmp_path / "out", "pt") as file:
        assert not [name for name in file.keys() if "running" in name]  # noqa: SIM118
        facts = file.metadata()
    assert facts["arch"] == "simple_v2" and json.loads(facts["classes"]) == [*"0123456789"]
    assert len(json.loads(facts["mean"])) == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_a_difference_above_the_tolerance_fails(kind, run_dir, tmp_path, monkeypatch, capsys):
    def spoil(network):
        fused = fuse(network)
        with torch.no_grad():
            next(m for m in fused.modules() if isinstance(m, nn.Linear)).bias[3] += 0.1
        return fused

    fuse = export.fuse
    monkeypatch.setattr(export, "fuse", spoil)
    with pytest.raises(SystemExit) as stop:
        export_to(kind, run_dir, tmp_path / "out")
    assert stop.value.code == 1
    assert "more than 0.0001 of the largest score" in capsys.readouterr().err
    export_to(kind, run_dir, tmp_path / "out", "--tolerance", "10")


def test_an_imagenet_network_is_checked_on_images_of_a_folder(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        folder = tmp_path / "images" / "val" / name
        folder.mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    line = f"--dummy -a resnet18 --deconv True --image-size 32 -j 0 {LINE} --test-run True"
    main_imagenet.main([*line.split(), "--test-iter", "1", "--run-dir", str(tmp_path / "run")])
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        export_to("torch-export", tmp_path / "run", out)
    assert stop.value.code == 2 and "--data DIR" in capsys.readouterr().err
    export_to("torch-export", tmp_path / "run", out, "--data", str(tmp_path / "images"))
    assert "over 6 images" in capsys.readouterr().out


@loop_over(
    ("words", "message"),
    [
        (["--images", "3"], "--images/--pictures: expected an integer of at least 4"),
        (["--pictures", "2"], "got '2'"),
        (["--data", "nowhere"], "--data nowhere does not apply to digits"),
    ],
)
def test_bad_input_is_refused(words, message, run_dir, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        export_to("torch-export", run_dir, tmp_path / "out", *words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and not (tmp_path / "out").exists()
    assert error.startswith("export.py: error: ") and error.count("\n") == 1


def test_a_missing_folder_of_images_is_named_with_its_flag(tmp_path):
    flags = Namespace(dataset="folder", data=str(tmp_path), image_size=32)
    with pytest.raises(DataError, match=f"--data {tmp_path}: no folder"):
        read_images(flags, None, 8)


def test_a_missing_checkpoint_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        export_to("torch-export", tmp_path, tmp_path / "out")
    assert stop.value.code == 2 and "checkpoint.pth.tar" in capsys.readouterr().err


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_missing_package_is_named_with_its_install_command(kind, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        export.main([str(tmp_path), "--to", kind, str(tmp_path / "out")])
    text = capsys.readouterr().err
    assert f"--to {kind} needs {', '.join(export.PACKAGES[kind])}, not installed here" in text
    assert f"pip install '.[{kind}]'" in text
