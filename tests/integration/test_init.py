"""Runs that start from the weights of earlier ones, by --init."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import main
from deconv import fuse
from models import build_model, make_layers
from tests.pairwise import loop_over
from util.checkpoint.store import load_checkpoint
from util.cli.settings import read_settings
from util.data.images import DataSpec
from util.training import initial

QUIET = "--save-plot False --tensorboard False --use-gpu False"
DIGITS = f"--dataset digits --batch-size 256 --epochs 1 --max-steps 2 --lr .01 {QUIET}"


def train(line, run_dir):
    main.main([*DIGITS.split(), *line.split(), "--run-dir", str(run_dir)])
    return load_checkpoint(run_dir / "checkpoint.pth.tar")


def refusal(capsys, line, run_dir):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.main([*DIGITS.split(), *line.split(), "--run-dir", str(run_dir)])
    assert stop.value.code == 2 and not run_dir.exists()
    (told,) = capsys.readouterr().err.splitlines()
    return told


def build(line):
    """The network of a command line, for digits."""
    flags, _ = read_settings(main.build_script(), [*DIGITS.split(), *line.split()])
    return main.build_network(flags, DataSpec("digits", 1, 32, tuple("0123456789"), (0.5,), (0.5,)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of simple_v2: with BatchNorm, and with deconvolution."""
    root = tmp_path_factory.mktemp("trained")
    for name, flags in (("bn", ""), ("deconv", "--deconv True")):
        train(f"--arch simple_v2 {flags}", root / name)
    return root


@pytest.fixture
def started(monkeypatch):
    """Networks as training begins with them."""
    networks = []

    def record(context, model, *args):
        start_from(context, model, *args)
        networks.append(model)

    start_from = initial.start_from
    monkeypatch.setattr(main, "start_from", record)
    monkeypatch.setattr(main, "fit", lambda *args, **more: None)
    return networks


def start(line, tmp_path):
    main.main([*DIGITS.split(), "--arch", "simple_v2", *line.split(), "--run-dir", f"{tmp_path}/n"])


def test_weights_of_the_same_layers_are_all_taken(trained, tmp_path, started, capsys):
    for name, flags in (("bn", ""), ("deconv", "--deconv True")):
        start(f"--init {trained / name} {flags}", tmp_path)
        expected = load_checkpoint(trained / name / "checkpoint.pth.tar")["model"]
        for key, value in started[-1].state_dict().items():
            assert torch.equal(value, expected[key]), key
        count = f"{len(expected)} of {len(expected)} tensors taken from {trained / name}"
        assert capsys.readouterr().out.splitlines() == [f"{count}/checkpoint.pth.tar"]


@loop_over("source", ["bn", "deconv"])
def test_deconvolution_starts_at_the_outputs_of_other_weights(trained, tmp_path, started, source):
    """Take weights of BatchNorm, and of the plain layers of an export."""
    theirs, init = build(f"--arch simple_v2 --deconv {source == 'deconv'}"), trained / source
    theirs.load_state_dict(load_checkpoint(init / "checkpoint.pth.tar")["model"])
    if source == "deconv":
        theirs, init = fuse(theirs.eval()), tmp_path / "fused.safetensors"
        pytest.importorskip("safetensors.torch").save_file(theirs.state_dict(), init)
    start(f"--deconv True --init {init}", tmp_path)
    ours, images = started[-1], torch.randn(256, 1, 32, 32)
    expected = theirs.eval()(images)
    torch.testing.assert_close(ours.eval()(images), expected, rtol=0, atol=2e-4)
    assert all(m.num_batches_tracked for m in ours.modules() if hasattr(m, "running_cov_joint"))


def test_another_number_of_classes_gets_a_new_head(trained, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("dark", "bright", "grey"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
                image.save(tmp_path / split / name / f"{number}.png")
    words = f"--dataset folder --data {tmp_path} --batch-size 4 --arch simple_v2 --deconv True"
    line = f"{words} --lr .01 --epochs 1 {QUIET} --init {trained / 'deconv'}"
    main.main([*line.split(), "--run-dir", str(tmp_path / "run")])
    out = capsys.readouterr().out.splitlines()
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["model"]
    head = list(state)[-1].rpartition(".")[0]
    assert out[1].startswith("new layers: ") and f"{head} (" in out[1]
    assert "10 x" in out[1] and "3 x" in out[1]


def test_a_resumed_run_needs_the_weights_no_more_but_names_them(tmp_path):
    weights, state = tmp_path / "weights.pth", build("--arch simple_v1").state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, weights)
    train(f"--arch simple_v1 --init {weights}", tmp_path / "run")
    weights.unlink()
    main.main(["--resume", str(tmp_path / "run"), "--max-steps", "3"])
    resumed = load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")
    record = json.loads((tmp_path / "run" / "args.json").read_text())["flags"]
    assert resumed["step"] == 3 and record["init"] == resumed["config"]["init"] == str(weights)
    auto = f"--arch simple_v1 --init {weights} --resume auto --max-steps 4"
    main.main([*DIGITS.split(), *auto.split(), "--run-dir", str(tmp_path / "run")])
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["step"] == 4


def test_what_would_be_wrong_is_refused(trained, tmp_path, capsys):
    other = tmp_path / "other.pth"
    torch.save(nn.Sequential(nn.Linear(2, 2)).state_dict(), other)
    code = tmp_path / "code.pth"
    torch.save(nn.Linear(2, 2), code)
    senet = tmp_path / "senet.pth"
    layers = make_layers(deconv=False)
    torch.save(build_model("senet", layers, in_channels=1).state_dict(), senet)
    bn, deconv, onnx = trained / "bn", trained / "deconv", tmp_path / "network.onnx"
    onnx.touch()
    for line, reason in (
        (f"--init {onnx}", "not read from this format; give a run, a checkpoint"),
        (f"--init {bn} --resume {bn}", "--init .*bn contradicts --resume"),
        (f"--init {bn} -e", "--init .*bn contradicts -e"),
        (f"--init {deconv}", "holds deconvolution layers; add --deconv True"),
        (f"--deconv True --mode 3 --init {deconv}", "fits only .*; use --mode 5$"),
        (f"--deconv True --block 8 --eps .1 --init {deconv}", "use --num-groups 16 --eps 0.01$"),
        (f"--deconv True --bias False --init {bn}", "--bias False contradicts --init"),
        (f"--deconv True --norm-type l1norm --init {bn}", "--norm-type l1norm contradicts --init"),
        (f"--batchnorm False --init {bn}", "the network none; build it with BatchNorm"),
        (f"--init {other}", f"--init {other}: no layer fits in name and shape"),
        (f"--init {code}", "may run code"),
        (f"--init {tmp_path / 'nowhere'}", "--init .*nowhere: No such file"),
        (f"--arch senet --deconv True --init {senet}", "the BatchNorm cannot be folded"),
    ):
        arch = "" if "--arch" in line else "--arch simple_v2"
        told = refusal(capsys, f"{arch} {line}", tmp_path / "run")
        assert told.startswith("main.py: error: ") and re.search(reason, told), told
