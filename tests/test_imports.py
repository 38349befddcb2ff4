"""Imports run one way: mains and scripts -> models -> deconv, mains and scripts -> util."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUND = ["errors", "files", "lock", "console", "device", "random_state"]
FLOORS = ["distributed", "data", "checkpoint", "tracking", "training", "cli"]  # upwards
OWN = {"deconv", "models", "util"}
PRODUCT = sorted(path for room in OWN for path in (ROOT / room).rglob("*.py"))
SCRIPTS = [*ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py")]


def imports(path):
    """Yield the dotted names that a file imports, also relatively and inside functions."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1] if node.level else ())
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                module = ROOT.joinpath(*base, alias.name)
                is_module = module.is_dir() or module.with_suffix(".py").exists()
                yield ".".join([*base, alias.name] if is_module else base)


def within(name, rooms):
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def allowed(path):
    """Return the packages and modules that a file may import besides the standard library."""
    room, *folder, file = path.relative_to(ROOT).with_suffix("").parts
    if room == "deconv":
        layers = [f"deconv.{path.stem}" for path in (ROOT / "deconv").glob("*.py")]
        if folder == ["ops"]:
            return ["torch", "deconv.ops"]
        if folder == ["published"]:
            return ["torch", "deconv.ops", "deconv.published", *layers]
        if folder == ["surgery"] or file == "__init__":
            return ["torch", "deconv.ops", "deconv.published", "deconv.surgery", *layers]
        return ["torch", "deconv.ops", *layers]
    if room == "models":
        more = {"factory": ["deconv"], "external": ["torchvision", "timm"]}
        return ["torch", "models", *more.get(file, [])]
    floors = FLOORS[: FLOORS.index(folder[0]) + 1] if folder else []
    return [f"util.{name}" for name in [*GROUND, *floors]]


@pytest.mark.parametrize("room", sorted(OWN))
def test_imports_run_downwards(room):
    faults = []
    for path in sorted((ROOT / room).rglob("*.py")):
        names = {
            name for name in imports(path) if name.split(".")[0] not in sys.stdlib_module_names
        }
        if room == "util":  # the harness may import any third-party package
            names = {name for name in names if within(name, OWN)}
        upward = sorted(name for name in names if not within(name, allowed(path)))
        faults += [f"{path.relative_to(ROOT)} imports {name}" for name in upward]
    assert faults == []


def test_util_has_no_room_without_a_floor():
    modules = {path.stem for path in (ROOT / "util").glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in (ROOT / "util").glob("*/__init__.py")}
    assert modules <= set(GROUND)
    assert folders <= set(FLOORS)


def test_nothing_imports_a_script():
    scripts = {path.stem for path in SCRIPTS} - {"__init__"} | {"scripts"}
    for path in PRODUCT:
        assert not {name.split(".")[0] for name in imports(path)} & scripts, path


@pytest.mark.parametrize("module", ["util.cli.parser", "util.cli.flags"])
def test_command_lines_load_neither_matplotlib_nor_torchvision(module):
    code = f"import sys, {module}; print(*{{'matplotlib', 'torchvision'}} & {{*sys.modules}})"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert loaded.split() == []
