"""scripts/paper/fine_tuning.py: a whole study on few small images, and its repetition."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from scripts.paper import fine_tuning
from tests.pairwise import loop_over


@pytest.fixture
def line(tmp_path):
    rng = np.random.default_rng(0)
    for split, label in ((s, c) for s in ("train", "test") for c in range(10)):
        folder = tmp_path / "images" / split / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(20 * label, 20 * label + 60, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    line = f"--data {tmp_path / 'images'} --arch lenet --batch-size 8 --begin 2 --steps 2"
    return f"{line} --lr 0.001 0.01 --seeds 0 1 --out {tmp_path / 'out'}".split()


def test_a_study_is_made_once_and_repeated_from_its_files(line, tmp_path, capsys, monkeypatch):
    fine_tuning.main(line)
    first = capsys.readouterr().out
    assert len(list((tmp_path / "out" / "lenet").glob("*.json"))) == 1 + 3 * 3 + 2
    (bn, converted, calibrated) = (row for row in first.splitlines() if row.startswith("| lenet"))
    start = [float(re.findall(r"\d\.\d{3}", row)[0]) for row in (bn, converted, calibrated)]
    assert all(0 < loss < 20 for loss in start) and "Before fine-tuning: test top-1" in first
    for made in ("train", "test"):
        monkeypatch.setattr(fine_tuning, made, None)
    fine_tuning.main([*line, "--plot", str(tmp_path / "plot.png")])
    again = capsys.readouterr().out
    assert again == first[first.index("| network") :] and (tmp_path / "plot.png").stat().st_size
    (tmp_path / "out" / "vgg11").mkdir()
    other = {"title": "vgg11", "curves": {"BatchNorm, lr 0.01": [(1, 2.0)]}}
    (tmp_path / "out" / "vgg11" / "panel.json").write_text(json.dumps(other))
    panels = fine_tuning.read_panels(tmp_path / "out")
    assert panels.pop("vgg11") == {"BatchNorm, lr 0.01": [[1, 2.0]]}
    labels = [label.split(", lr")[0] for label in panels.popitem()[1]]
    assert labels == [*fine_tuning.ARMS.values()]


def test_conversions_keep_the_layers_of_skip_and_have_their_own_files(line, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(fine_tuning, "convert", lambda network, **o: found.append(o) or network)
    short = ["--skip", "*conv1*", "--eps", "0.1", "--seeds", "0", "--lr", "0.01"]
    fine_tuning.main([*line, *short])
    assert {(o["eps"], *o["skip"]) for o in found} == {(0.1, "*conv1*")} and len(found) == 2
    names = sorted(file.name for file in (tmp_path / "out" / "lenet").glob("*seed0*"))
    assert [name.split("-lr")[0] for name in names] == [
        "bn",
        "calibrated-eps0.1-skip-%2Aconv1%2A",
        "converted-eps0.1-skip-%2Aconv1%2A",
    ]


@loop_over(
    ("words", "fault"),
    [
        ("--image-size 40", "has trainings with --image-size 32: choose another --out"),
        ("--batch-size 4", "has trainings with --batch-size 8: choose another --out"),
        ("--arch vgg11 --batch-size 64", "--batch-size 64: there are 20 images"),
    ],
)
def test_trainings_on_other_images_and_batches_without_an_end_are_refused(line, words, fault):
    study = fine_tuning.Study(fine_tuning.make_parser().parse_args(line))
    study.load(0)
    with pytest.raises(SystemExit, match=re.escape(fault)):
        fine_tuning.main([*line, *words.split()])


def test_an_arm_is_shown_at_the_rate_that_is_best_with_the_first_seed():
    def run(top1):
        return {"start": 1.0, "curve": [2.0, 1.0], "test_top1": top1}

    results = {0.1: [run(60.0), run(70.0)], 0.01: [run(50.0)]}
    assert fine_tuning.find_best(results) == 0.1
    flags = fine_tuning.make_parser().parse_args(["--data", "x", "--steps", "2"])
    text = fine_tuning.format_results({"bn": results}, 40.0, flags)
    assert (
        "| vgg11 | BatchNorm | 1.000 | 0.1: 60.0, 0.01: 50.0 | 0.1 | 60.00, 70.00 | 65.00 |" in text
    )
