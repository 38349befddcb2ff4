"""Code of docs/use_the_layer.md runs as it stands, section by section, but for sizes."""

import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

import deconv
from deconv.whitening import Whitening

PAGE = Path(__file__).resolve().parents[2] / "docs" / "use_the_layer.md"
TEXT = PAGE.read_text(encoding="utf-8")
SMALLER = {
    "batch_size=64": "batch_size=2",
    "num_workers=4": "num_workers=0",
    "range(10)": "range(1)",
}


def sections():
    """Return title -> the blocks of Python of each section as one text."""
    _, *parts = TEXT.split("\n## ")
    blocks = {
        part.partition("\n")[0]: re.findall(r"```python\n(.*?)```", part, re.DOTALL)
        for part in parts
    }
    return {title: "\n".join(code) for title, code in blocks.items()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Enter a folder with images, with weights that need no download and settings of one rank."""
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in rank.items():
        monkeypatch.setenv(name, value)


def test_every_section_has_code_and_every_public_name_its_place():
    assert all(sections().values())
    assert all(large in TEXT for large in SMALLER)
    functions = {name for name in deconv.__all__ if name.islower() and "batch" not in name}
    assert functions <= set(re.findall(r"[a-z_]+", TEXT))


@pytest.mark.parametrize("title", sections())
def test_a_section_runs(title, here):
    code = sections()[title]
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    names = {"__name__": "page"}
    exec(compile(code, f"{PAGE.name}: {title}", "exec"), names)
    layers = [m for m in names["network"].modules() if isinstance(m, Whitening)]
    assert layers
    if "served" in names:
        assert not any(isinstance(m, Whitening) for m in names["served"].modules())
    else:
        assert all(layer.weight.grad is not None for layer in layers)


def test_the_table_of_the_plan_is_the_printed_one():
    printed = deconv.plan(
        torchvision.models.resnet18(), mode=3, block=32, skip=["layer4.*", "conv1"]
    )
    first, last = re.search(
        r"```\n(layer .*?)```\n\nand ends:\n\n```\n(.*?)```", TEXT, re.DOTALL
    ).groups()
    lines = [line.split() for line in str(printed).splitlines()]
    shown = [line.split() for line in first.splitlines()]
    assert shown == lines[: len(shown)]
    shown = [line.split() for line in last.splitlines()]
    assert shown == lines[-len(shown) :]


def test_every_message_in_the_table_of_faults_is_one_of_the_package():
    package = Path(deconv.__file__).parent.rglob("*.py")
    source = re.sub(r'"\n +f?"', "", "".join(path.read_text() for path in package))
    _, faults = TEXT.split("## When it goes wrong")
    quoted = re.findall(r"^\| `([^`]* [^`]*)` \|", faults, re.MULTILINE)
    assert len(quoted) >= 5
    for message in quoted:
        own = not message.startswith("cannot import name")  # a message of Python
        assert not own or all(part in source for part in message.split("NAME")), message
