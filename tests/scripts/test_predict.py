"""Tests of scripts/predict.py: images are classified as the test of the run classifies them."""

import csv
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
import main_imagenet
from scripts import export, exported_network, predict
from scripts.trained_network import load_network, read_images
from tests.pairwise import loop_over
from util.data.embedded_sets import read_fashion_mini
from util.data.known_classes import build_test_loader
from util.data.loader import LoaderOptions

LINE = "--use-gpu False --tensorboardX False --save-plot False --batch-size 8 --epochs 1 --lr .01"
GUIDE = Path(__file__).parents[2] / "docs" / "train.md"
COUNT = 6  # images


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run on grey images, its exports, and a folder of the first test images."""
    home = tmp_path_factory.mktemp("home")
    line = f"--dataset fashion-mini --arch simple_v2 --deconv True --max-steps 3 {LINE}"
    main.main([*line.split(), "--run-dir", str(home / "run")])
    (home / "images").mkdir()
    _, (pixels, _) = read_fashion_mini()
    for number in range(COUNT):
        Image.fromarray(pixels[number]).save(home / "images" / f"{number}.png")
    return home


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folders of two runs on coloured images of two classes, one per script."""
    home, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split in ("train", "val"):
        for name, low in (("dark", 0), ("bright", 128)):
            (home / "DIR" / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(low, low + 128, (50, 45, 3), np.uint8)
                Image.fromarray(pixels).save(home / "DIR" / split / name / f"{number}.png")
    quick = f"{LINE} --image-size 32 -j 0 --max-steps 1"
    words = ["-a", "simple_v2", "--dataset", "folder", "--data", str(home / "DIR")]
    main.main([*quick.split(), *words, "--run-dir", str(home / "small")])
    words = ["-a", "squeezenet1_1", str(home / "DIR"), "--run-dir", str(home / "large")]
    main_imagenet.main([*quick.split(), *words])
    return home


def run(*words, code=0):
    """Run predict.py, which ends with `code`."""
    try:
        predict.main([str(word) for word in words])
    except SystemExit as end:
        assert end.code == code
    else:
        assert code == 0


def read_json(file):
    return json.loads(Path(file).read_text())


def export_to(kind, run_dir, out, *more):
    for package in export.PACKAGES[kind]:
        pytest.importorskip(package)
    export.main([str(run_dir), "--to", kind, str(out), *map(str, more)])
    return out


@pytest.mark.parametrize("kind", ["run", "onnx", "safetensors"])
def test_images_are_classified_as_by_the_test_of_the_run(kind, home, tmp_path, capsys):
    place = home / "run"
    if kind != "run":
        place = export_to(kind, place, tmp_path / f"network.{kind}")
    trained = load_network(str(home / "run"))
    with torch.no_grad():
        expected = trained.network(read_images(trained, None, COUNT)).softmax(1)
    capsys.readouterr()
    run(place, home / "images", "--json", tmp_path / "out.json")
    lines = capsys.readouterr().out.splitlines()
    for number, row in enumerate(read_json(tmp_path / "out.json")):
        best = expected[number].topk(5)
        found = row["classes"]
        assert row["image"] == str(home / "images" / f"{number}.png")
        assert [entry["name"] for entry in found] == [trained.spec.classes[k] for k in best.indices]
        probabilities = torch.tensor([entry["probability"] for entry in found])
        torch.testing.assert_close(probabilities, best.values, rtol=1e-3, atol=1e-5)
        first = f"{row['image']}  {found[0]['name']} {100 * found[0]['probability']:.2f}%  "
        assert lines[number].startswith(first)
    assert len(lines) == COUNT


def test_images_that_cannot_be_read_are_listed_and_all_others_predicted(home, tmp_path, capsys):
    for number in range(0, COUNT, 2):
        (tmp_path / f"{number}.png").write_bytes((home / "images" / f"{number}.png").read_bytes())
        (tmp_path / f"{number + 1}.png").write_bytes(b"no image")
    gone, table = tmp_path / "gone.jpg", tmp_path / "out.csv"
    run(home / "run", tmp_path, gone, "--csv", table, "--json", tmp_path / "out.json", code=1)
    output, errors = capsys.readouterr()
    assert [Path(line.split("  ")[0]).name for line in output.splitlines()] == [
        f"{number}.png" for number in range(0, COUNT, 2)
    ]
    *listed, summary = errors.splitlines()
    assert len(listed) == 4 and f"cannot decode the image {tmp_path / '1.png'}" in listed[0]
    assert listed[-1] == f"cannot read the image {gone}: No such file or directory"
    assert summary == "predict.py: 4 of 7 images cannot be read"
    rows = read_json(tmp_path / "out.json")
    assert [row.get("error") for row in rows if "error" in row] == listed
    with open(table, newline="") as file:
        cells = list(csv.DictReader(file))
    for row, entry in zip(cells, rows, strict=True):
        first = entry.get("classes", [{"name": ""}])[0]["name"]
        assert (row["class_1"], row["error"]) == (first, entry.get("error", ""))


def test_many_images_keep_their_order(home, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "BATCH_SIZE", 2)  # loaded in several processes
    run(home / "run", home / "images", "--json", tmp_path / "out.json")
    run(home / "run", home / "images" / "4.png", "--json", tmp_path / "one.json")
    rows = read_json(tmp_path / "out.json")
    assert [Path(row["image"]).name for row in rows] == sorted(os.listdir(home / "images"))
    (alone,) = read_json(tmp_path / "one.json")
    names = [[entry["name"] for entry in row["classes"]] for row in (alone, rows[4])]
    assert names[0] == names[1]


def test_a_network_trained_to_another_loss_says_so(tmp_path, home, capsys):
    line = f"--dataset fashion-mini --arch simple_v1 --loss L2 --max-steps 1 {LINE}"
    main.main([*line.split(), "--run-dir", str(tmp_path / "run")])
    run(tmp_path / "run", home / "images")
    assert "note: trained with --loss L2" in capsys.readouterr().err


def test_bad_input_is_refused_in_one_line(home, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("bad.pt2", "bad.pth.tar", "bad.onnx"):
        (tmp_path / name).write_bytes(b"no network")
    (tmp_path / "bad.safetensors").write_bytes(b"no network")
    for words, message in (
        ([home / "run", tmp_path / "empty"], f"{tmp_path / 'empty'}: no images in this folder"),
        ([home / "run", "x.png", "--csv", tmp_path / "no" / "x"], f"{tmp_path}/no/x cannot be"),
        ([home / "run", "x.png", "--json", tmp_path], f"{tmp_path} cannot be written"),
        ([home / "run", "x.png", "--csv", "out", "--json", "out"], "--json out: is the file of"),
        ([tmp_path, "x.png"], f"{tmp_path}: no checkpoint"),
        ([tmp_path / "bad.pth.tar", "x.png"], "not a checkpoint (File is not a zip file)\n"),
        ([tmp_path / "bad.pt2", "x.png"], "an exported file has to be named *.onnx or *.saf"),
        ([tmp_path / "gone.onnx", "x.png"], "gone.onnx: No such file"),
        ([tmp_path / "bad.onnx", "x.png"], "bad.onnx: damaged, or not an ONNX file"),
        ([tmp_path / "bad.safetensors", "x.png"], "bad.safetensors: damaged, or not a"),
    ):
        if "onnx" in str(words[0]):
            pytest.importorskip("onnxruntime")
        run(*words, code=2)
        error = capsys.readouterr().err
        assert message in error and error.startswith("predict.py: error: ")
        assert error.count("\n") == 1, error


@loop_over("name", ["onnx", "safetensors"])
def test_a_missing_package_is_named_with_its_install_command(name, monkeypatch, capsys):
    monkeypatch.setattr(exported_network, "find_spec", lambda name: None)
    run(f"network.{name}", "x.png", code=2)
    package = "onnxruntime" if name == "onnx" else name
    assert f"needs {package}, not installed here: pip install {package}" in capsys.readouterr().err


def test_files_without_the_facts_are_refused(home, tmp_path, monkeypatch, capsys):
    written = exported_network.format_metadata
    monkeypatch.setattr(export, "format_metadata", lambda facts: {"author": "me", **written(facts)})
    out = export_to("safetensors", home / "run", tmp_path / "network.safetensors")
    run(out, home / "images" / "0.png")  # metadata of the user do no harm
    monkeypatch.setattr(export, "format_metadata", lambda facts: {"arch": facts["arch"]})
    export_to("safetensors", home / "run", out)
    run(out, "x.png", code=2)
    error = capsys.readouterr().err
    assert "no complete metadata of its network" in error and "export it again" in error


def read_section(title):
    """Return a section of the guide, without its heading."""
    return GUIDE.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize(
    ("name", "other_script", "count"), [("small", "main_imagenet", 5), ("large", "main", 6)]
)
def test_the_guide_runs_and_its_program_preprocesses_as_the_test(
    name, other_script, count, photos, tmp_path, monkeypatch, capsys
):
    for package in export.PACKAGES["onnx"]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    Path("DIR").symlink_to(photos / "DIR")
    Path("FOLDER").symlink_to(photos / "DIR" / "val" / "dark")
    Path("RUN").symlink_to(photos / name)
    for number, file in enumerate(("cat.jpg", "dog.jpg")):
        Image.open(photos / "DIR" / "val" / "dark" / f"{number}.png").save(file)
    section = read_section("Test on other images") + read_section("Predict and export")
    lines = re.findall(r"^python (\S+)\.py (.*?)(?: *#.*)?$", section, re.MULTILINE)
    scripts = {"main": main, "main_imagenet": main_imagenet}
    scripts |= {"scripts/predict": predict, "scripts/export": export}
    commands = [(script, words) for script, words in lines if script != other_script]
    for script, words in commands:
        scripts[script].main(words.split())
    assert len(commands) == count

    program, cropped = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len([line for line in program.splitlines() if line]) == 8
    if name == "large":
        program = re.sub(r"^image = .*resize.*\n", cropped, program, flags=re.MULTILINE)
    spec = load_network("RUN").spec
    ((images, _),) = build_test_loader(spec, "DIR", LoaderOptions(batch_size=8))
    paths = sorted(map(str, Path("DIR", "val").rglob("*.png")))
    run("RUN", *paths, "--json", "out.json")
    for path, image, row in zip(paths, images, read_json("out.json"), strict=True):
        monkeypatch.setattr(sys, "argv", ["program.py", path])
        capsys.readouterr()
        names = {}
        exec(program, names)
        np.testing.assert_allclose(names["pixels"][0], image, atol=1e-5)
        assert capsys.readouterr().out == row["classes"][0]["name"] + "\n"
