"""The README, docs and scripts: the scripts accept every command of theirs, the tree is whole."""

import os
import re
import shlex
from pathlib import Path

import pytest

import main
import main_imagenet
from util.cli.settings import read_settings

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"main": main, "main_imagenet": main_imagenet}
PUBLISHED = """
--arch vgg11 --epochs 20 --dataset cifar10 --batch-size 128 --deconv False --num-groups-final 0 --wd .001
--arch vgg11 --epochs 20 --dataset cifar10 --batch-size 128 --deconv True --num-groups-final 512 --wd .001
--arch simple_v1 --epochs 1 --dataset cifar10 --batch-size 512 --method 1 --loss CE
--arch simple_v1 --epochs 1 --dataset cifar10 --batch-size 512 --method 1 --loss L2
--arch resnet --epochs 100 --dataset cifar10 --batch-size 512 --deconv False --num-groups-final 0
--arch resnet --epochs 100 --dataset cifar10 --num-groups-final 512 --batch-size 512 --deconv True
--arch resnet50 --epochs 100 --dataset cifar100 --batch-size 128 --deconv True --num-groups-final 512
--arch resnet50 --epochs 100 --dataset cifar100 --batch-size 128 --deconv False --num-groups-final 0
--arch vgg11 --epochs 100 --dataset cifar100 --batch-size 128 --deconv True --num-groups-final 512
--arch vgg11 --epochs 100 --dataset cifar100 --batch-size 128 --deconv False --num-groups-final 0
--arch vgg13 --epochs 100 --dataset cifar100 --batch-size 128 --deconv True --num-groups-final 512
--arch vgg13 --epochs 100 --dataset cifar100 --batch-size 128 --deconv False --num-groups-final 0
--arch vgg19 --epochs 100 --dataset cifar100 --batch-size 128 --deconv True --num-groups-final 512
--arch vgg19 --epochs 100 --dataset cifar100 --batch-size 128 --deconv False --num-groups-final 0
--arch vgg11 --epochs 100 --dataset cifar100 --batch-size 128 --deconv True --mode 3 --num-groups-final 512
"""  # noqa: E501


def commands(path):
    """Script and arguments of each `python main.py ...`, by torchrun too, in a file.

    Lines are joined and arrays filled in.
    """
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    arrays = dict(re.findall(r"^(\w+)=\((.*)\)$", text, flags=re.MULTILINE))
    pattern = r"\b(?:python3?|torchrun\b[^\n`]*) (main|main_imagenet)\.py\b([^\n`|>]*)"
    for script, line in re.findall(pattern, text):
        for name, words in arrays.items():
            line = line.replace(f'"${{{name}[@]}}"', words)
        line = line.replace('"$@"', "").replace("$out", "out")
        yield SCRIPTS[script], shlex.split(line, comments=True)


def documents():
    readme = [path for path in [ROOT / "README.md"] if path.exists()]
    return readme + sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "scripts").rglob("*.sh"))


def read(argv, script=main):
    """All flags as a script would take them; checkpoints are not there to be read."""
    if "--resume" in argv:
        return script.build_script().parser.parse_typed(argv)
    return vars(read_settings(script.build_script(), argv)[0])


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_accepted(path):
    for script, argv in commands(path):
        if "help" not in argv[-1]:
            read(argv, script)


def test_the_readmes_tree_has_every_file():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Files")[2]
    rooms = [ROOT / room for room in ("deconv", "models", "util", "scripts", "docs")]
    files = [path for room in rooms for path in room.glob("*.*") if path.suffix != ".png"]
    assert [path.name for path in files if not re.search(rf"\b{path.name}\b", tree)] == []


def test_recipes_hold_the_published_commands():
    recipes = (ROOT / "scripts" / "recipes").glob("*.sh")
    shown = [read(argv) for path in recipes for _, argv in commands(path)]
    common = "--lr .1 --optimizer SGD --msg True "
    for line in PUBLISHED.strip().splitlines():
        assert read(shlex.split(common + line)) in shown, line


def test_every_recipe_says_what_to_expect():
    for path in sorted((ROOT / "scripts" / "recipes").glob("*.sh")):
        assert re.search("[Ee]xpect", path.read_text(encoding="utf-8")), path
        assert list(commands(path)), path


def test_scripts_are_what_the_shell_accepts():
    for path in sorted((ROOT / "scripts").rglob("*.sh")):
        assert os.system(f"bash -n {shlex.quote(str(path))}") == 0


def test_continuous_integration_runs_the_tests_as_users_do():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["bash scripts/test.sh"]
