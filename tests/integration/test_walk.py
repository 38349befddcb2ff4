"""The walk of docs/train.md from a folder of images to a model in use, command by command."""

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PAGE = Path(__file__).resolve().parents[2] / "docs" / "train.md"
TITLE = "From a folder of images to a model in use"
SMALLER = {
    "--arch resnet18": "--arch simple_v2 --batch-size 8 --lr 0.01",
    "--epochs 20": "--epochs 1",
}
SMALLER |= {"--epochs 30": "--epochs 2"}
OUTSIDE = ("tensorboard",)  # programs of others
LEFT = (
    "runs/first/confusion_matrix.csv",
    "runs/first/confusion_matrix.png",
    "layers.png",
    "predictions.csv",
)


def read_lines():
    section = PAGE.read_text(encoding="utf-8").partition(f"## {TITLE}")[2].partition("\n## ")[0]
    lines = [
        line.partition(" #")[0]
        for line in re.search(r"```sh\n(.*?)```", section, re.S)[1].splitlines()
    ]
    return [line for line in lines if not line.startswith(OUTSIDE)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Enter a folder with images of two classes, bright and dark."""
    rng = np.random.default_rng(0)
    for folder in ("DIR/train", "DIR/test", "OTHER", "FOLDER"):
        for name, low in (("bright", 128), ("dark", 0)):
            (tmp_path / folder / name).mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(low, low + 128, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / name / f"{number}.png")
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_walk_runs(here, capsys):
    pytest.importorskip("onnxruntime")
    for line in read_lines():
        for large, small in SMALLER.items():
            line = line.replace(large, small)
        _, script, *argv = shlex.split(line, comments=True)
        argv += ["--use-gpu", "False", "--threads", "1"] if script == "main.py" else []
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        try:
            module.main(argv)
        except SystemExit as end:
            assert not end.code, line
    assert [name for name in LEFT if not (here / name).exists()] == []
    output = capsys.readouterr().out
    assert "dark" in output
