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
from scripts.trained_network import TrainedNetwork, load_network, read_images
from tests.pairwise import loop_over
from util.data.images import DataSpec
from util.errors import DataError

FORMATS = ["onnx", "torch-export", "safetensors"]
LINE = "--use-gpu False --tensorboardX False --save-plot False --batch-size 8 --epochs 1 --lr .01"
PACKAGES = {"onnx": "onnxruntime", "safetensors": "safetensors"}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A network with convolutions and a Delinear, after three steps on digits."""
    folder = tmp_path_factory.mktemp("run")
    line = f"--dataset digits --arch simple_v2 --deconv True --max-steps 3 {LINE} --ema .5"
    main.main([*line.split(), "--run-dir", str(folder / "run")])
    return folder / "run"


def export_to(kind, run_dir, out, *more):
    if kind in PACKAGES:
        pytest.importorskip(PACKAGES[kind])
        pytest.importorskip("onnxscript" if kind == "onnx" else kind)
    export.main([str(run_dir / "checkpoint.pth.tar"), "--to", kind, str(out), *more])


def test_the_moving_average_is_exported_or_the_trained_weights(run_dir, tmp_path):
    by_choice = {use: load_network(run_dir, use_ema=use) for use in (None, True, False)}
    images = read_images(by_choice[None], None, 4)
    with torch.no_grad():
        scores = {use: trained.network(images) for use, trained in by_choice.items()}
    assert torch.equal(scores[None], scores[True]) and not torch.equal(scores[True], scores[False])
    export_to("torch-export", run_dir, tmp_path / "trained", "--use-ema", "False")
    exported = torch.export.load(tmp_path / "trained").module()
    torch.testing.assert_close(exported(images), scores[False], rtol=1e-4, atol=1e-4)


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
    assert {path.name for path in out.parent.iterdir()} == {"network", "network.json"}
    facts, spec = json.loads((out.parent / "network.json").read_text()), load_network(run_dir).spec
    inside = read_metadata(kind, out)
    assert (inside["arch"], inside["dataset"]) == ("simple_v2", "digits")
    for name in ("preprocessing", "flags"):
        assert json.loads(inside[name]) == facts[name]
    assert facts["flags"]["arch"] == "simple_v2" and "data" not in facts["flags"]
    size = {"pad": 0, "resize": 32, "keep_aspect": False, "crop": 32, "interpolation": "bilinear"}
    numbers = {"mean": list(spec.mean), "std": list(spec.std), "classes": [*"0123456789"]}
    assert facts["preprocessing"] == {"colour": "L", **size, **numbers}


def read_metadata(kind, out):
    if kind == "onnx":
        import onnxruntime

        return onnxruntime.InferenceSession(out).get_modelmeta().custom_metadata_map
    if kind == "torch-export":
        files = dict.fromkeys(["arch", "dataset", "preprocessing", "flags"], "")
        torch.export.load(out, extra_files=files)
        return {
            name: text.decode() if isinstance(text, bytes) else text for name, text in files.items()
        }
    from safetensors import safe_open

    with safe_open(out, "pt") as file:
        return file.metadata()


def test_safetensors_hold_plain_layers(run_dir, tmp_path):
    export_to("safetensors", run_dir, tmp_path / "out")
    from safetensors import safe_open

    with safe_open(tmp_path / "out", "pt") as file:
        assert not [name for name in file.keys() if "running" in name]  # noqa: SIM118


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
    (tmp_path / "images" / "train").symlink_to(tmp_path / "images" / "val")
    line = f"-a resnet18 --deconv True --image-size 32 -j 0 {LINE} --run-dir {tmp_path / 'run'}"
    main_imagenet.main([*line.split(), str(tmp_path / "images")])
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        export_to("torch-export", tmp_path / "run", out)
    assert stop.value.code == 2 and "--data DIR" in capsys.readouterr().err
    export_to("torch-export", tmp_path / "run", out, "--data", str(tmp_path / "images" / "val"))
    assert "over 6 images" in capsys.readouterr().out
    (tmp_path / "images" / "val" / "c").mkdir()
    with pytest.raises(SystemExit):
        export_to("torch-export", tmp_path / "run", out, "--data", str(tmp_path / "images"))
    assert f"{tmp_path / 'images' / 'val' / 'c'}: it knows a, b" in capsys.readouterr().err


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


def make_untrained(dataset, data):
    spec = DataSpec(dataset, 3, 32, ("a", "b"), (0.5,) * 3, (0.5,) * 3)
    flags = Namespace(data=data, image_size=32, max_image_pixels=10**6)
    return TrainedNetwork(None, flags, spec, {})


def test_a_missing_folder_of_images_is_named_with_its_flag(tmp_path):
    trained = make_untrained("folder", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=f"--data {tmp_path}/gone: no folder"):
        read_images(trained, None, 8)


def test_a_network_of_noise_is_checked_on_noise():
    trained = make_untrained("dummy", None)
    assert read_images(trained, None, 8).shape == (8, 3, 32, 32)
    with pytest.raises(ValueError, match="--data DIR does not apply to dummy"):
        read_images(trained, "DIR", 8)


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
