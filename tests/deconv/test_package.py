"""`pip install .`: the folder deconv/ alone, which needs nothing but torch."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deconv

ROOT = Path(__file__).resolve().parents[2]
USE = """
import sys, torch
before = set(sys.modules)
import deconv
assert deconv.__file__.startswith({target!r}), deconv.__file__
new = {{name.partition(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names
assert new == {{"deconv"}}, new
network = torch.nn.Sequential(deconv.FastDeconv(3, 4, 3), deconv.Delinear(5, 2))
network(torch.randn(2, 3, 7, 7)).sum().backward()
assert type(deconv.fuse(network.eval())[0]) is torch.nn.Conv2d
"""


def run(*command, cwd):
    # Isolated (-I): neither the checkout nor PYTHONPATH is looked at.
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the package was installed to, from a copy that may be built in."""
    pytest.importorskip("setuptools", minversion="77")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in ("deconv", "models", "util", "scripts"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE", "main.py"):
        shutil.copy(ROOT / name, source)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run("-m", "pip", "install", *offline, "--target", str(target), ".", cwd=source)
    return target


def test_the_readmes_example_runs():
    torchvision = pytest.importorskip("torchvision")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    images = torch.randn(2, 3, 32, 32)
    exec(code, {"torchvision": torchvision, "images": images, "loader": [images]})


def test_every_public_name_is_documented():
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8").partition("## Public names")[2]
    assert set(deconv.__all__) <= set(re.findall(r"\w+", page))


def list_files(folder):
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path) for path in files if path.suffix != ".pyc"}


def test_the_package_alone_is_installed(installed):
    folders = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert folders == {"deconv"}
    assert list_files(installed / "deconv") == list_files(ROOT / "deconv")


def test_torch_is_its_only_dependency_and_it_has_a_version(installed):
    (package,) = importlib.metadata.distributions(path=[str(installed)])
    assert (package.name, package.version) == ("deconv", deconv.__version__)
    needed = [line for line in package.requires if "extra ==" not in line]
    assert [line.split(">=")[0] for line in needed] == ["torch"]


def test_the_installed_package_works_alone(installed, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(installed)!r})\n" + USE.format(
        target=str(installed)
    )
    run("-I", "-c", code, cwd=tmp_path)
