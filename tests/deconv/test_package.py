"""The package: built from this checkout, installed into an empty environment, used there alone."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import deconv

ROOT = Path(__file__).resolve().parents[2]
NAME, VERSION = "network-deconvolution", deconv.__version__
FILES = f"{NAME.replace('-', '_')}-{VERSION}"
EXAMPLE = r"```python\n(.*?)```"
# Import every module of the package, then run the example of its readme, which takes one step.
USE = """
import importlib, importlib.metadata, pkgutil, re, sys
import torch
before = set(sys.modules)
import deconv
for module in pkgutil.walk_packages(deconv.__path__, "deconv."):
    importlib.import_module(module.name)
new = set(sys.modules) - before
assert "torch._dynamo" not in new  # the compiler takes seconds to import
roots = {name.partition(".")[0] for name in new} - sys.stdlib_module_names
assert roots == {"deconv"}, roots
readme = importlib.metadata.metadata("NAME").get_payload()
exec(re.search(r"```python\\n(.*?)```", readme, re.DOTALL)[1])
assert type(served[0]) is nn.Conv2d and all(p.grad is not None for p in network.parameters())
print([deconv.__file__, *sorted(name for name in new if name.startswith("deconv"))])
"""


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the two distributions, built from a copy of all that git lists."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("build")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    command = ("build", "--no-isolation", "--outdir", str(folder), str(source))
    run(sys.executable, "-m", *command, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """An environment that holds the wheel, and torch by a path to the present environment."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    (packages,) = [*folder.glob("lib/python*/site-packages"), *folder.glob("Lib/site-packages")]
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(packages))
    wheel = built / f"{FILES}-py3-none-any.whl"
    run(sys.executable, "-m", "pip", "install", *offline, str(wheel), cwd=folder)
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    return folder, packages


def list_package(files):
    """Return the files of the folder deconv/, without compiled ones."""
    return {file for file in files if file.startswith("deconv/") and "__pycache__" not in file}


EXPECTED = list_package(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "deconv").rglob("*") if path.is_file()
)


def test_the_readmes_example_runs():
    torchvision = pytest.importorskip("torchvision")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(EXAMPLE, readme, re.DOTALL)
    images = torch.randn(2, 3, 32, 32)
    exec(code, {"torchvision": torchvision, "images": images, "loader": [images]})


def test_every_public_name_is_documented():
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8").partition("## Public names")[2]
    assert set(deconv.__all__) <= set(re.findall(r"\w+", page))


def test_the_wheel_holds_the_package_and_its_metadata_alone(built):
    assert {path.name for path in built.iterdir()} == {
        f"{FILES}.tar.gz",
        f"{FILES}-py3-none-any.whl",
    }
    with zipfile.ZipFile(built / f"{FILES}-py3-none-any.whl") as archive:
        files = archive.namelist()
    assert list_package(files) == EXPECTED and "deconv/py.typed" in files
    assert {file.partition("/")[0] for file in files} == {"deconv", f"{FILES}.dist-info"}


def test_the_source_distribution_holds_what_the_wheel_is_built_from_alone(built):
    with tarfile.open(built / f"{FILES}.tar.gz") as archive:
        files = {file.name.removeprefix(f"{FILES}/") for file in archive if file.isfile()}
    assert list_package(files) == EXPECTED
    folders = {file.partition("/")[0] for file in files if "/" in file}
    assert folders == {"deconv", "network_deconvolution.egg-info"}
    assert {"pyproject.toml", "LICENSE"} <= files


def test_the_registry_takes_both_distributions(built):
    pytest.importorskip("twine")
    names = sorted(str(path) for path in built.iterdir())
    run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *names, cwd=built)


def test_torch_is_its_only_dependency_and_it_has_name_version_and_licence(environment):
    (package,) = [
        found
        for found in importlib.metadata.distributions(path=[str(environment[1])])
        if found.name == NAME
    ]
    assert package.version == VERSION
    needed = [line for line in package.requires if "extra ==" not in line]
    assert [line.split(">=")[0] for line in needed] == ["torch"]
    assert package.metadata["License-Expression"] == "MIT"
    assert package.metadata["Description-Content-Type"] == "text/markdown"
    assert package.read_text("licenses/LICENSE") == (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_installed_package_trains_alone(environment, tmp_path):
    folder, packages = environment
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    # Isolated (-I): neither the checkout nor PYTHONPATH is looked at.
    out = run(str(python), "-I", "-c", USE.replace("NAME", NAME), cwd=tmp_path)
    file, *modules = ast.literal_eval(out)
    assert Path(file).is_relative_to(packages)
    python_files = [file for file in EXPECTED if file.endswith(".py")]
    assert len(modules) == len(python_files)


def test_a_tag_of_this_commit_names_the_version():
    tags = run("git", "tag", "--points-at", "HEAD", "v*", cwd=ROOT).split()
    assert set(tags) <= {f"v{VERSION}"}
