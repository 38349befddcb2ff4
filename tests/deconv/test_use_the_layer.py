"""docs/use_the_layer.md: its code runs as it stands, section by section, but for sizes."""

import re
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from deconv.conv import Convolution

PAGE = Path(__file__).resolve().parents[2] / "docs" / "use_the_layer.md"
SMALLER = {
    "batch_size=64": "batch_size=2",
    "num_workers=4": "num_workers=0",
    "range(10)": "range(1)",
}


def sections():
    """Title -> its blocks of Python as one text."""
    _, *parts = PAGE.read_text(encoding="utf-8").split("\n## ")
    blocks = {
        part.partition("\n")[0]: re.findall(r"```python\n(.*?)```", part, re.DOTALL)
        for part in parts
    }
    return {title: "\n".join(found) for title, found in blocks.items()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with images, and weights that need no download."""
    for name in ("bright", "dark"):
        folder = tmp_path / "images" / "train" / name
        folder.mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    state = torchvision.models.resnet18().state_dict()
    weights = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: state)


def test_every_section_has_code():
    assert len(sections()) == 6 and all(sections().values())


@pytest.mark.parametrize("title", sections())
def test_a_section_runs(title, here):
    code = sections()[title]
    for large, small in SMALLER.items():
        assert large in PAGE.read_text(encoding="utf-8")
        code = code.replace(large, small)
    names = {"__name__": "page"}
    exec(compile(code, f"{PAGE.name}: {title}", "exec"), names)
    layers = [m for m in names["network"].modules() if isinstance(m, Convolution)]
    assert layers
    if "served" in names:
        assert not any(isinstance(m, Convolution) for m in names["served"].modules())
    elif "optimizer" not in names:  # the last one of that section is not trained
        assert all(layer.weight.grad is not None for layer in layers)
