"""Runs on a machine without a network, where images and weights are present."""

import socket
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.models import get_model, get_model_weights

import main
import main_imagenet
from tests.util.data.test_torchvision_sets import write_cifar10

ONE_STEP = "--max-steps 1 --batch-size 4 --use-gpu False -j 0"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Make every look-up of a name and every connection a failure of the test."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a run reaches for the network: {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_images_that_were_downloaded_earlier_are_enough(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    line = f"--dataset cifar10 --data {tmp_path} --arch simple_v2 {ONE_STEP} --epochs 1"
    main.main([*line.split(), "--run-dir", str(tmp_path / "run")])
    main.main(["-e", "--resume", str(tmp_path / "run"), "--data", str(tmp_path)])


def test_weights_that_were_downloaded_earlier_are_enough(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = Path(get_model_weights("squeezenet1_1").DEFAULT.url).name
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    model = get_model("squeezenet1_1", weights=None)
    torch.save(model.state_dict(), tmp_path / "hub" / "checkpoints" / weights)
    for number in range(8):
        folder = tmp_path / ("train", "val")[number // 4] / ("dark", "bright")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (30 * number,) * 3).save(folder / f"{number}.png")
    line = f"-a squeezenet1_1 --pretrained --image-size 64 {ONE_STEP} --run-dir {tmp_path / 'run'}"
    main_imagenet.main([*line.split(), str(tmp_path)])
    main_imagenet.main(["--resume", str(tmp_path / "run"), "--max-steps", "2", str(tmp_path)])
