"""Measurements of scripts/bench/gpu.py, with short programs in place of the parts."""

import json

import pytest

from scripts.bench import gpu
from scripts.bench.gpu import Part


def make_part(tmp_path, name, code):
    return Part(name, ["-c", code], tmp_path / f"{name}.json", lambda path: json.loads("[1]"))


def test_finished_parts_are_not_repeated_and_others_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 5.0)
    ready = tmp_path / "ready"
    parts = [
        make_part(tmp_path, "good", f"open({str(tmp_path / 'count')!r}, 'a').write('x')"),
        make_part(tmp_path, "bad", "print('no memory'); raise SystemExit(3)"),
        make_part(
            tmp_path, "late", f"import os, time; os.path.exists({str(ready)!r}) or time.sleep(60)"
        ),
    ]
    file, results = tmp_path / "gpu.json", {}
    gpu.run_parts(parts, results, file, 8.0)
    saved = json.loads(file.read_text())
    states = {name: part["state"] for name, part in saved.items()}
    assert states == {"good": "finished", "bad": "failed", "late": "interrupted"}
    assert saved["bad"]["result"] == ["no memory"] and saved["good"]["result"] == [1]
    assert "to do: bad, late; the same command continues" in capsys.readouterr().out
    ready.touch()
    gpu.run_parts(parts, saved, file, 60.0)
    assert (tmp_path / "count").read_text() == "x"
    assert json.loads(file.read_text())["late"]["state"] == "finished"


def test_every_part_is_a_command_that_its_script_accepts(tmp_path):
    flags = gpu.make_parser().parse_args(["--cifar10", str(tmp_path), "--out", str(tmp_path)])
    parts = gpu.list_parts(flags)
    assert len({part.name for part in parts}) == len(parts)
    from main import build_script
    from scripts.bench import steps
    from scripts.paper import runner, table1

    parsers = {"scripts/bench/steps.py": steps.make_parser(), "main.py": build_script().parser}
    for part in parts:
        name = next((word for word in part.command if word.endswith(".py")), None)
        words = list(part.command)[list(part.command).index(name) + 1 :] if name else []
        if name in parsers:
            parsers[name].parse_args(words)
        elif name:
            found, passed = runner.make_parser(table1.RECIPE).parse_known_args(words)
            runs = [run for run in table1.choose(found)(None) if found.only in run.name]
            assert not passed and [run.name for run in runs] == [part.path.name]


def test_results_become_rows(tmp_path):
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite tests="9" failures="1" errors="0" skipped="2"/></testsuites>'
    )
    times = {"base_seconds": 0.002, "deconv_seconds": 0.004, "ratio": 2.0, "quartiles": [1.9, 2.1]}
    case = {"arch": "vgg11", "mode": 5, "block": 16, "batch_size": 128, "dtype": "float32"}
    (tmp_path / "steps.json").write_text(json.dumps({"rows": [{**case, "train": times}]}))
    (tmp_path / "summary.json").write_text(
        json.dumps({"steps": 391, "test_top1": 74.5, "images_per_second": 9000.4})
    )
    results = {
        "environment": {"device": "cuda, X"},
        "tests": gpu.read_tests(tmp_path / "tests.xml"),
        "small": gpu.read_steps(tmp_path / "steps.json"),
        "vgg11-bn": gpu.read_run(tmp_path),
    }
    parts = {
        name: {"state": "finished", "seconds": 3.0, "result": value}
        for name, value in results.items()
    }
    text = gpu.format_results({**parts, "environment": results["environment"]})
    assert text.startswith("cuda, X\n")
    for row in (
        "| small | vgg11 | 128 | 5 | 2.0 | 4.0 | 2.00 [1.90, 2.10] |",
        "| vgg11-bn | 391 | 74.50 | 9,000 |",
        "| tests | 9 | 1 | 0 | 2 |",
        "| vgg11-bn | finished | 3.0 |",
    ):
        assert row in text


@pytest.mark.parametrize("words", [[], ["--cifar10", "/nowhere"]])
def test_a_machine_without_a_gpu_or_images_is_refused(words, monkeypatch, capsys):
    for available, error in ((False, "finds no CUDA device"), (True, "has no folder train/")):
        monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda value=available: value)
        with pytest.raises(SystemExit, match="2"):
            gpu.main(words)
        assert error in capsys.readouterr().err
