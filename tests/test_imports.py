"""Dependencies run one way: scripts -> models -> deconv -> torch, and scripts -> util."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"deconv", "models", "util"}


def files(folder):
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def imported(path):
    """Top-level packages that a file imports, its own by relative imports included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                names.add(node.module.split(".")[0])
            else:
                up = path.relative_to(ROOT).parts[: -node.level]
                names.add(up[0] if up else (node.module or "").split(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", files("deconv"), ids=lambda path: path.stem)
def test_deconv_imports_torch_alone(path):
    assert imported(path) <= {"torch", "deconv"}


@pytest.mark.parametrize("path", files("models"), ids=lambda path: path.stem)
def test_models_import_torch_and_deconv_in_the_factory_only(path):
    more = {"factory.py": {"deconv"}, "external.py": {"torchvision", "timm"}}
    assert imported(path) <= {"torch", "models"} | more.get(path.name, set())


@pytest.mark.parametrize("path", files("util"), ids=lambda path: path.stem)
def test_util_knows_neither_models_nor_deconv(path):
    assert not imported(path) & (OURS - {"util"})


def test_nothing_imports_a_script():
    scripts = {path.stem for path in (*ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py"))}
    for folder in OURS:
        for path in files(folder):
            assert not imported(path) & scripts, path
