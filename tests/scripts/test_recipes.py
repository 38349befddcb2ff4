"""Recipes: the published commands, as they were, each with the accuracy to expect."""

import os
import re
import shlex
from pathlib import Path

from tests.commands import find_commands, read_flags

ROOT = Path(__file__).resolve().parents[2]
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


def test_recipes_hold_the_published_commands():
    recipes = (ROOT / "scripts" / "recipes").glob("*.sh")
    shown = [read_flags(argv) for path in recipes for _, argv in find_commands(path)]
    common = "--lr .1 --optimizer SGD --msg True "
    for line in PUBLISHED.strip().splitlines():
        assert read_flags(shlex.split(common + line)) in shown, line


def test_every_recipe_says_what_to_expect():
    for path in sorted((ROOT / "scripts" / "recipes").glob("*.sh")):
        assert re.search("[Ee]xpect", path.read_text(encoding="utf-8")), path
        assert list(find_commands(path)), path


def test_scripts_are_what_the_shell_accepts():
    for path in sorted((ROOT / "scripts").rglob("*.sh")):
        assert os.system(f"bash -n {shlex.quote(str(path))}") == 0


def test_continuous_integration_runs_the_tests_as_users_do():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "bash scripts/test.sh"
