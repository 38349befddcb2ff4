"""Comparison with rivals: runs, steps of every arm, records, table and pictures."""

import json
import math
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deconv import Delinear, FastDeconv
from models import airbench
from scripts.paper import records, rivals, rivals_arms, rivals_steps, rivals_train, runner
from scripts.paper.rivals_layers.decorrelation import DecorrelatedConv2d, DecorrelatedLinear
from scripts.paper.rivals_layers.iter_norm import IterNorm
from scripts.paper.rivals_layers.output_norm import NormalizedDeconv
from scripts.paper.rivals_layers.weight_standardization import StandardizedConv2d
from tests.pairwise import loop_over
from util.checkpoint.store import load_checkpoint
from util.cli.settings import read_settings
from util.distributed.world import World
from util.errors import RunError
from util.tracking import plots

QUIET = "--save-plot False --tensorboard False --threads 1 --use-gpu False"


@loop_over("arm", rivals_arms.ARMS)
def test_every_arm_steps_the_network_of_airbench(arm):
    step_every_arm_on("airbench", arm)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["vgg11", "resnet18"])
@pytest.mark.parametrize("arm", rivals_arms.ARMS)
def test_every_arm_steps_every_network(network, arm):
    step_every_arm_on(network, arm)


def step_every_arm_on(network, arm):
    step = rivals_steps.make_step(network, arm, Namespace(batch_size=4))
    losses = [step() for _ in range(2)]
    assert all(map(math.isfinite, losses)) and losses[0] != losses[1]
    assert rivals_steps.count_flops(step) > 4 * 1e8


@loop_over(
    ("arm", "kinds", "absent"),
    [
        ("bn-sgd", {nn.Conv2d, nn.BatchNorm2d}, FastDeconv),
        ("head-muon", {nn.Conv2d, nn.BatchNorm2d, Delinear}, FastDeconv),
        ("ws", {StandardizedConv2d}, nn.BatchNorm2d),
        ("gn", {nn.GroupNorm}, nn.BatchNorm2d),
        ("iternorm", {IterNorm}, nn.BatchNorm2d),
        ("decorrelation", {DecorrelatedConv2d, DecorrelatedLinear, nn.BatchNorm2d}, FastDeconv),
        ("deconv-muon", {FastDeconv, Delinear}, NormalizedDeconv),
        ("outnorm", {NormalizedDeconv}, nn.BatchNorm2d),
    ],
)
def test_an_arm_has_its_layers_in_every_network(arm, kinds, absent):
    for network in rivals_arms.NETWORKS:
        flags = read_flags(rivals_arms.make_flags((network, arm), 0.1, 0))
        with torch.device("meta"):
            model = rivals_train.build_network(flags, rivals_steps.CIFAR10)
        found = {type(module) for module in model.modules()}
        assert kinds <= found and absent not in found, network
        plain = {nn.Conv2d} & found
        assert not plain or arm in ("bn-sgd", "head-muon", "gn", "iternorm"), network


def test_batchnorm_follows_pooling_and_the_other_outputs_are_normalized_by_their_layer():
    line = "--arch airbench --deconv True --rival output-norm-pooled --stats-momentum 0.4"
    model = rivals_train.build_network(read_flags(line), rivals_steps.CIFAR10).train()
    for group in model.groups:
        group[3].register_forward_pre_hook(check_moments)
    model(torch.randn(32, 3, 32, 32).cumsum(3))
    kinds = [type(layer) for layer in model.groups[0]]
    assert kinds[:3] == [FastDeconv, nn.MaxPool2d, nn.BatchNorm2d]
    assert kinds[4:6] == [NormalizedDeconv, nn.Identity]
    assert model.groups[0][0].momentum == model.groups[2][4].momentum == 0.4
    assert all(
        p.requires_grad == (name == "bias") for name, p in model.groups[0][2].named_parameters()
    )


@loop_over(("arch", "count"), [("airbench", 6), ("vgg11", 8), ("resnet18", 20)])
def test_batchnorm_stands_behind_deconvolutions_where_the_network_has_it(arch, count):
    flags = read_flags(f"--arch {arch} --deconv True --rival batchnorm-behind")
    with torch.device("meta"):
        model = rivals_train.build_network(flags, rivals_steps.CIFAR10)
    kinds = [type(layer) for layer in model.modules()]
    deconvs = [layer for layer in model.modules() if isinstance(layer, FastDeconv)]
    assert kinds.count(FastDeconv) == kinds.count(nn.BatchNorm2d) == count
    assert all(layer.bias is None for layer in deconvs)


def check_moments(module, args):
    variance, mean = torch.var_mean(args[0], (0, 2, 3), correction=0)
    torch.testing.assert_close(variance, torch.ones_like(mean), rtol=1e-3, atol=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-3)


def read_flags(line):
    return read_settings(rivals_train.build_script(), line.split())[0]


@loop_over(
    ("line", "fault"),
    [
        ("--rival output-norm", "--rival output-norm needs --deconv True"),
        ("--rival batchnorm-behind", "--rival batchnorm-behind needs --deconv True"),
        (
            "--rival output-norm-pooled --deconv True",
            "--rival output-norm-pooled needs --arch airbench",
        ),
        ("--stats-momentum 0.5", "--stats-momentum 0.5 needs --deconv True"),
        ("--head-rate 0.2", "--head-rate 0.2 needs --recipe airbench"),
        ("--bias-rate 0.01", "--bias-rate 0.01 needs --recipe airbench"),
        (
            "--arch airbench --recipe airbench --lr-scheduler linear --optimizer AdamW"
            " --head-rate 0.2",
            "--head-rate 0.2 has no effect on AdamW",
        ),
        ("--rival iter-norm --deconv True", "--rival iter-norm contradicts --deconv True"),
        ("--rival iter-norm", "--rival iter-norm replaces BatchNorm, needs --batchnorm False"),
        ("--arch lenet", "--arch lenet is not offered here: choose vgg11, resnet18, airbench"),
        ("--recipe airbench", "--recipe airbench needs --arch airbench"),
        ("--arch airbench --recipe airbench", "--recipe airbench needs --lr-scheduler linear"),
        (
            "--arch airbench --recipe airbench --lr-scheduler linear --optimizer Adam",
            "--optimizer Adam is not offered by --recipe airbench: choose SGD, AdamW or Muon",
        ),
        (
            "--arch airbench --recipe airbench --lr-scheduler linear --warmup-epochs 1",
            "--warmup-epochs 1.0 is set by --recipe airbench",
        ),
        (
            "--arch airbench --recipe airbench --lr-scheduler linear --optimizer Muon --wd 0.1",
            "--wd 0.1 has no effect on Muon in --recipe airbench",
        ),
    ],
)
def test_flags_that_contradict_each_other_are_refused(line, fault):
    script = rivals_train.build_script()
    script.parser.error = fail
    with pytest.raises(SystemExit) as stop:
        read_settings(script, line.split())
    assert fault in str(stop.value)


def test_decorrelation_refuses_cuda_graphs_which_keep_no_images():
    context = SimpleNamespace(
        flags=read_flags("--rival decorrelation"),
        world=World(),
        build_accelerator=lambda: SimpleNamespace(cuda_graphs=True),
    )
    with pytest.raises(RunError, match="decorrelation: .* add --cuda-graphs False"):
        rivals_train.train(context)


def fail(message, status=2):
    raise SystemExit(message)


def test_a_run_becomes_a_record_with_six_views_and_continues_where_it_was_stopped(
    image_folder, tmp_path
):
    line = "--arch airbench --recipe airbench --rival decorrelation --optimizer Muon --lr 0.24"
    line += " --lr-scheduler linear"
    line += " --epochs 2 --print-freq 1 --checkpoint-epoch 1 --label-smoothing 0.2 --batch-size 8"
    line += f" --dataset folder --data {image_folder} --out {tmp_path} {QUIET}"
    whole, parts = tmp_path / "runs" / "rivals" / "whole", tmp_path / "parts"
    rivals_train.main([*line.split(), "--run-dir", str(whole)])
    parts.mkdir()
    (whole / "checkpoint_1.pth.tar").rename(parts / "checkpoint.pth.tar")
    words = ["--data", str(image_folder), "--run-dir", str(parts)]
    rivals_train.main([*words, "--resume", str(parts / "checkpoint.pth.tar")])
    one, other = (load_checkpoint(folder / "checkpoint.pth.tar") for folder in (whole, parts))
    assert one["step"] == other["step"] == 4
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    matrix = one["model"]["groups.0.4.R"]
    assert not torch.equal(matrix, torch.eye(len(matrix)))
    views = [json.loads((folder / "views.json").read_text()) for folder in (whole, parts)]
    assert views[0] == views[1] and 0 <= views[0]["views_top1"] <= 100
    run = runner.Run("whole", "cifar10", "--lr 0.24", 4, 1.0, program=rivals.PROGRAM)
    recipe = runner.Recipe("rivals", "", lambda find: [run], str, read_more=rivals.read_more)
    record = runner.gather(recipe, whole.parent, {})["whole"]
    assert record["views_top1"] == views[0]["views_top1"]
    assert [step for step, _ in record["top1_curve"]] == [1, 2, 3, 4]


def test_a_run_in_a_new_folder_has_six_views_and_its_validation(
    image_folder, tmp_path, monkeypatch, capsys
):
    data = []
    monkeypatch.setattr(airbench, "WIDTHS", (24, 24, 24))
    monkeypatch.setattr(
        rivals_train, "fit", lambda context, loaders, *_, **__: data.extend(loaders)
    )
    line = "--arch airbench --recipe airbench --lr-scheduler linear --val-split 0.5 --batch-size 4"
    line += f" --dataset folder --data {image_folder} --out {tmp_path} {QUIET}"
    rivals_train.main(line.split())
    assert "% on six views" in capsys.readouterr().out
    assert len(data[1].validation.dataset) == len(data[1].dataset)


def make_record(top1, rate, seed, **more):
    flags = {"seed": seed, "lr": rate, "weight_decay": 0.0, "batch_size": 128}
    machine = {"versions": {"torch": "2"}, "commit": "c" * 40, "device": "cpu", "processor": "P"}
    metrics = {"test_top1": top1, "train_seconds": 90.0, "train_loss": 1.5, "steps": 150}
    curves = {"curve": [[10, 2.0], [150, 1.0]], "top1_curve": [[10, 20.0], [150, 50.0]]}
    epochs = [[1, 1.5, 40.0, 1.4, top1, 0.0, 90.0]]
    return {"flags": flags, **machine, **metrics, **curves, "epochs": epochs, **more}


@pytest.fixture
def few_records():
    """Return a finished search and three seeds of one arm, and a search under way of another."""
    case, name = ("vgg11", "bn-sgd"), rivals_arms.name_run
    found = {
        name(case, rate, 0): make_record(top1, rate, 0)
        for rate, top1 in ((0.01, 60.0), (0.03, 70.0), (0.1, 50.0))
    }
    found |= {name(case, 0.03, seed): make_record(70.0 + seed, 0.03, seed) for seed in (1, 2)}
    return found | {name(("airbench", "bn-muon"), 0.24, 0): make_record(80.0, 0.24, 0)}


def test_the_table_shows_finished_arms_and_every_rate(few_records, monkeypatch):
    measured = {"rows": [], "rounds": 5, "environment": {"processor": "P"}}
    row = {"network": "vgg11", "arm": "bn-sgd", "seconds": 0.5, "ratio": 1.0, "flops": 2e12}
    monkeypatch.setattr(rivals, "load", lambda *args: {**measured, "rows": [row]})
    shown = rivals.format_tables(few_records)
    top1 = "| VGG-11 | BatchNorm | SGD | 0.03 | **71.00** (70.00, 71.00, 72.00)"
    assert f"{top1} | - | 500 | 1.00 | 75 | 0.3000 |" in shown["accuracy"]
    assert shown["accuracy"].count("\n") == 3  # the search of the other arm has not ended
    rates = "| VGG-11 | BatchNorm | SGD | 0.01: 60.00, 0.03: 70.00, 0.1: 50.00 |"
    assert rates in shown["rates"] and "0.24: 80.00" in shown["rates"]
    assert shown["pictures"] == "![VGG-11](results_rivals_vgg11.png)"
    assert (shown["machine"], shown["rounds"]) == ("P", "5")


def test_an_empty_record_is_told_and_drawn_as_nothing(tmp_path):
    shown = rivals.format_tables({})
    assert shown["accuracy"] == shown["rates"] == rivals.NO_RUNS and shown["pictures"] == ""
    rivals.draw({}, tmp_path / "results_rivals.png")
    assert not list(tmp_path.iterdir())


def test_six_views_are_shown_beside_one(few_records):
    name = rivals_arms.name_run(("vgg11", "bn-sgd"), 0.03, 1)
    few_records[name]["views_top1"] = 72.5
    assert "(70.00, 71.00, 72.00) | 72.50 |" in rivals.format_tables(few_records)["accuracy"]


def test_pictures_depend_on_the_records_alone(few_records, tmp_path):
    drawn = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        rivals.draw(few_records, folder / "results_rivals.png")
        drawn.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert drawn[0] == drawn[1] and [*drawn[0]] == ["results_rivals_vgg11.png"]


def test_curves_have_the_seconds_of_steps_timed_in_turn():
    record = make_record(70.0, 0.1, 0)
    curves = rivals._make_curves(record, {"seconds": 0.5}, rivals_arms.NETWORKS["vgg11"])
    assert curves.testing("top1").seconds.tolist() == [75.0]
    assert curves.training("top1").seconds.tolist() == [5.0, 75.0]
    curves = rivals._make_curves(record, None, rivals_arms.NETWORKS["vgg11"])
    assert curves.testing("top1").seconds.tolist() == [90.0]  # those of the run itself


def test_every_kind_of_layers_has_a_colour_of_its_own():
    kinds = {arm.kind for arm in rivals_arms.ARMS.values()} - {"bn"}
    assert len(kinds) <= len(plots.DECONV_COLORS)


def test_steps_are_timed_in_turn_and_networks_measured_earlier_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(
        rivals_arms, "ARMS", {k: rivals_arms.ARMS[k] for k in ("bn-sgd", "outnorm")}
    )
    file = tmp_path / "steps.json"
    file.write_text(json.dumps({"rows": [{"network": "vgg11", "arm": "bn-sgd"}]}))
    line = f"--network airbench --rounds 2 --warmup 0 --batch-size 2 --json {file}"
    rivals_steps.main(line.split())
    kept, base, ours = json.loads(file.read_text())["rows"]
    assert kept == {"network": "vgg11", "arm": "bn-sgd"}
    assert base["ratio"] == 1 and ours["ratio"] > 0 and ours["flops"] > base["flops"] > 0
    # Three products a convolution, two FLOPs each, without the gradient of the images.
    assert base["flops"] == pytest.approx(2 * 0.71e9, rel=0.1)


def test_the_search_begins_with_three_rates_and_stays_within_its_series():
    for case in [("vgg11", "bn-sgd"), ("airbench", "deconv-muon")]:
        series = rivals_arms.NETWORKS[case[0]].rates[rivals_arms.find_optimizer(case)]
        rates, best = rivals.search(case, lambda name: None)
        assert best is None and len(rates) == 3 and min(series) < min(rates)
        rates, best = rivals.search(case, lambda name: float(name.split("lr")[1].split("-")[0]))
        assert best == max(series) == rates[-1]


def test_the_committed_records_name_the_machine_of_their_steps():
    measured = records.load(rivals.TIMES)
    known = {(network, arm) for network in rivals_arms.NETWORKS for arm in rivals_arms.ARMS}
    assert {(row["network"], row["arm"]) for row in measured.get("rows", ())} <= known
