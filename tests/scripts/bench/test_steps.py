"""scripts/bench/steps.py: one row per case, and the metrics in it."""

import json

import pytest
import torch

from scripts.bench import steps
from util.errors import RunError

SMALL = ["--arch", "simple_v2", "--batch-size", "2", "--rounds", "2", "--warmup", "1"]
SMALL += ["--device", "cpu"]


def test_the_ratio_is_the_median_of_the_pairs():
    metrics = steps.summarize([1.0, 2.0, 4.0], [3.0, 2.0, 8.0])
    assert metrics["ratio"] == 2  # of 3, 1, 2; the ratio of the medians would be 1.5
    assert metrics["quartiles"] == [1.5, 2.5]
    assert (metrics["base_seconds"], metrics["deconv_seconds"]) == (2, 3)


def test_networks_take_turns_and_the_warm_up_is_dropped(monkeypatch):
    calls = []
    monkeypatch.setattr(steps, "read_clock", lambda: len(calls) ** 2)
    both = (lambda: calls.append("base"), lambda: calls.append("ours"))
    times = steps.time_in_turn(*both, rounds=2, warmup=1)
    assert calls == ["base", "ours", "ours", "base", "base", "ours"]
    assert times == ([7, 9], [5, 11])  # 4^2 - 3^2, 5^2 - 4^2; 3^2 - 2^2, 6^2 - 5^2


def test_every_case_has_a_row_in_the_table_and_in_the_file(tmp_path, capsys):
    path = tmp_path / "times.json"
    cases = ["--mode", "5", "3", "--dtype", "float32", "bf16", "--option", "shared=False"]
    steps.main([*SMALL, *cases, "--no-memory", "--json", str(path)])
    environment, _, head, rule, *rows = capsys.readouterr().out.splitlines()
    assert torch.__version__ in environment and "thread" in environment
    assert len(rows) == 4 and {line.count("|") for line in (head, rule, *rows)} == {14}
    assert rows[1].startswith("| simple_v2 | 5 | 16 | 2 | bf16 | ") and rows[1].endswith(
        "| - | - |"
    )
    content = json.loads(path.read_text())
    assert [(row["mode"], row["dtype"]) for row in content["rows"]] == [
        (mode, dtype) for mode in (5, 3) for dtype in ("float32", "bf16")
    ]
    for row in content["rows"]:
        for part in (row["train"], row["eval"]):
            assert len(part["base_times"]) == len(part["deconv_times"]) == 2
            assert part["ratio"] > 0
    assert content["flags"]["option"] == [["shared", False]]
    assert content["environment"]["torch"].endswith(torch.__version__)


@pytest.mark.parametrize("against, has_norm", [("bn", True), ("plain", False), ("deconv", False)])
def test_networks_are_of_their_kind(against, has_norm):
    flags = steps.make_parser().parse_args([*SMALL, "--option", "layout=contiguous"])
    case = steps.Case("vgg11", 4, 64, 2, "float32")
    with torch.device("meta"):
        modules = list(steps.build(case, against, flags).modules())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in modules) == has_norm
    ours = [module for module in modules if isinstance(module, steps.FastDeconv)]
    assert bool(ours) == (against == "deconv")
    assert all((m.mode, m.block, m.layout) == (4, 64, "contiguous") for m in ours)


@pytest.mark.parametrize("arch", ["vgg11", "resnet18", "densenet121", "resnet18d"])
def test_a_fused_network_has_the_parameters_of_the_plain_one(arch):
    flags = steps.make_parser().parse_args(SMALL)
    case = steps.Case(arch, 3, 16, 2, "float32")
    with torch.device("meta"):
        plain, ours = (steps.build(case, kind, flags) for kind in ("plain", "deconv"))
        fused = steps.fuse(ours.eval())
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (plain, ours, fused)]
    assert shapes[0] == shapes[2] != shapes[1]


@pytest.mark.parametrize("flags, modes", [([], {True, False}), (["--fuse"], {True})])
def test_fuse_evaluates_without_a_deconvolution_layer(flags, modes, monkeypatch, tmp_path, capsys):
    seen, forward = [], steps.FastDeconv.forward
    monkeypatch.setattr(
        steps.FastDeconv,
        "forward",
        lambda self, x: seen.append(self.training) or forward(self, x),
    )
    path = tmp_path / "times.json"
    rounds = ["--eval-rounds", "3", "--no-memory", "--json", str(path)]
    steps.main([*SMALL, *rounds, "--against", "plain", *flags])
    assert set(seen) == modes
    assert ("fused eval (ms)" in capsys.readouterr().out) == bool(flags)
    (row,) = json.loads(path.read_text())["rows"]
    assert [len(row[part]["deconv_times"]) for part in ("train", "eval")] == [2, 3]


def test_gradients_are_checked_except_for_unchecked(monkeypatch):
    checked, check = [], steps.Accelerator.backward
    monkeypatch.setattr(
        steps.Accelerator, "backward", lambda *args: checked.append(1) or check(*args)
    )
    flags = steps.make_parser().parse_args(SMALL)
    case = steps.Case("simple_v2", 5, 16, 2, "float32")
    for kind, count in (("unchecked", 0), ("deconv", 1)):
        train, finish = steps.make_steps(case, kind, flags, torch.device("cpu"))
        train()
        finish()()
        assert len(checked) == count


def test_memory_is_that_of_a_process_of_its_own():
    ballast = torch.ones(2**26)  # 256 MiB that the fresh process does not hold
    case = steps.Case("simple_v2", 5, 16, 64, "float32")
    flags = steps.make_parser().parse_args(SMALL)
    memory = steps.ask_memory(case, "deconv", flags, torch.device("cpu"))
    if memory is None:
        pytest.skip("the system does not report memory")
    assert 1 < memory < ballast.nbytes / 2**20


def test_memory_is_measured_for_both_networks(monkeypatch, capsys):
    answers = {"plain": 123.4, "deconv": None}
    monkeypatch.setattr(steps, "ask_memory", lambda case, kind, *more: answers[kind])
    steps.main([*SMALL, "--against", "plain"])
    assert capsys.readouterr().out.endswith(" | 123 | - |\n")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--option colour=red", ("--option", "'colour=red'", "n_iter")),
        ("--option layout=diagonal", ("layout", "'diagonal'")),
        ("--option n_iter=many", ("--option n_iter=many",)),
        ("--rounds -3", ("--rounds", "'-3'")),
        ("--arch vgg12", ("--arch vgg12", "vgg11")),
        ("--json nowhere/times.json", ("--json nowhere/times.json",)),
    ],
)
def test_refuses_in_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        steps.main([*SMALL, *flags.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and all(word in line for word in words), line


def test_a_step_that_cannot_be_captured_is_refused_in_one_line(monkeypatch, capsys):
    def measure(case, flags, device):
        raise RunError("steps cannot be recorded (so it is): train with --cuda-graphs False")

    monkeypatch.setattr(steps, "measure_times", measure)
    with pytest.raises(SystemExit) as stop:
        steps.main([*SMALL, "--no-memory"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "--cuda-graphs False" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_a_missing_gpu_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        steps.main(["--device", "cuda"])
    assert stop.value.code == 2 and "--device cuda" in capsys.readouterr().err


@pytest.mark.gpu
def test_times_and_memory_on_a_gpu(capsys):
    steps.main([*SMALL, "--device", "cuda", "--channels-last"])
    *_, base, ours, _ = capsys.readouterr().out.splitlines()[-1].split("|")
    assert 0 < float(base) < float(ours)
