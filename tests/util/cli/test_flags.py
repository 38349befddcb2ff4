"""The command line: spelling, aliases, defaults and ranges of the flags."""

from inspect import signature

import pytest

import main
from deconv import FastDeconv
from deconv.conv import MODES, ROOTS
from deconv.whitening import LAYOUTS
from util.training.optim import LOSSES, OPTIMIZERS, SCHEDULES

PUBLISHED_DEFAULTS = """
    --arch vgg11 --dataset cifar10 --epochs 100 --batch-size 512 --loss CE --optimizer SGD --lr .1
    --lr-scheduler cosine --momentum .9 --wd 5e-4 --milestone .4 --multistep-gamma .1 --seed 0
    --deconv False --mode 5 --num-groups 16 --eps 1e-2 --deconv-iter 5 --stride 3 --data ./data
    --dropout-rate 0 --save-plot True --tensorboardX True --msg False
"""


def typed(line):
    return main.build_script().parser.parse_typed(line.split())


def refusal(capsys, line):
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        typed(line)
    assert stop.value.code == 2
    (only,) = capsys.readouterr().err.splitlines()
    assert only.startswith("main.py: error: ")
    return only


def test_defaults_are_the_published_ones():
    defaults = main.build_script().parser.defaults()
    published = typed(PUBLISHED_DEFAULTS)
    assert {name: defaults[name] for name in published} == published


@pytest.mark.parametrize(
    ("short", "name", "value"),
    [
        ("-j 2", "num_workers", 2),
        ("-b 64", "batch_size", 64),
        ("-a resnet", "arch", "resnet"),
        ("--weight-decay 1e-3", "weight_decay", 1e-3),
        ("--block 8", "num_groups", 8),
        ("--block-fc 256", "num_groups_final", 256),
        ("--tensorboard no", "tensorboardX", False),
        ("--milestone 60 80", "milestone", [60, 80]),
        ("--use-gpu 0", "use_gpu", False),
    ],
)
def test_aliases(short, name, value):
    assert typed(short) == {name: value}


@pytest.mark.parametrize(
    "line",
    [
        *("--lr 0", "--lr nan", "--momentum 1", "--wd -1", "--eps 0", "--dropout-rate 1"),
        *("--batch-size 0", "--epochs 0", "--max-steps 0", "--num-workers -1", "--threads 0"),
        *("--mode 6", "--method 5", "--num-groups 0", "--num-groups-final -1", "--deconv-iter 0"),
        *("--stride 0", "--seed -1", "--print-freq 0", "--checkpoint-epoch -1", "--stem-iter 0"),
        *("--image-size 31", "--milestone 0", "--multistep-gamma 0", "--deconv perhaps"),
        *("--arch vgg12", "--dataset cifar", "--optimizer sgd", "--loss L1", "--preset best"),
        *("--lr-scheduler linear", "--layout random", "--deconv-iter 16", "--stem-iter 16"),
        *("--threads 999999999999", "--batch-size 100000000000000000000", "--num-workers 2000"),
        *("--epochs 1e9", "--eps 1e-13", "--milestone 1e-9", "--multistep-gamma 1.5"),
        *("--lr 1e+300", "--wd 1e+300", "--eps 1e+300"),  # which PyTorch takes for no float32
    ],
)
def test_values_out_of_range_are_refused_by_name(capsys, line):
    message = refusal(capsys, line)
    flag, value = line.split()
    assert flag in message and value in message


@pytest.mark.parametrize("flag", ["--data", "--out", "--run-dir", "--resume"])
def test_places_without_a_name_are_refused(capsys, flag):
    assert flag in refusal(capsys, f"{flag}=")
    assert flag in refusal(capsys, f"{flag}=a\0b")


def test_unknown_and_shortened_flags_are_refused(capsys):
    assert "--momentums" in refusal(capsys, "--momentums .5")
    assert "--num-group" in refusal(capsys, "--num-group 8")


def test_the_flag_that_was_meant_is_named(capsys):
    assert refusal(capsys, "--decnov True").endswith("did you mean --deconv?")


def test_arch_help_and_a_wrong_name_list_the_architectures(capsys):
    with pytest.raises(SystemExit) as stop:
        typed("--arch help")
    assert stop.value.code == 0
    listed = capsys.readouterr().out
    wrong = refusal(capsys, "--arch lenet9")
    for name in main.ARCHITECTURES:
        assert name in listed and name in wrong


def test_help_has_groups_and_tells_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        typed("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for title in ("network", "deconvolution", "data", "training", "output"):
        assert f"\n{title}:\n" in text
    assert max(map(len, text.splitlines())) <= 100
    for choice in (*LOSSES, *OPTIMIZERS, *SCHEDULES, *LAYOUTS):
        assert choice in text


def test_choices_are_those_of_the_layers():
    for layout in LAYOUTS:
        assert typed(f"--layout {layout}") == {"layout": layout}
    for mode in MODES:
        assert typed(f"--mode {mode}") == {"mode": mode}
    for root in ROOTS:
        assert typed(f"--root {root}") == {"root": root}


def test_defaults_are_those_of_the_layers():
    ours, theirs = main.build_script().parser.defaults(), signature(FastDeconv).parameters
    names = {"share_blocks": "shared", "num_groups": "block", "deconv_iter": "n_iter"}
    names |= {name: name for name in ("mode", "eps", "layout", "root", "rows_per_feature")}
    names["stride"] = "sampling_stride"
    for flag, keyword in names.items():
        assert ours[flag] == theirs[keyword].default, flag


def test_a_mirror_is_named_by_flag_or_variable(monkeypatch, capsys):
    monkeypatch.setenv("DECONV_DATA_URL", "file:///data/archives")
    assert main.build_script().parser.defaults()["data_url"] == "file:///data/archives"
    assert typed("--data-url http://host/files") == {"data_url": "http://host/files"}
    monkeypatch.setenv("DECONV_DATA_URL", "ftp://host")
    with pytest.raises(SystemExit):
        main.build_script().parser.defaults()
    assert "argument --data-url: " in (told := capsys.readouterr().err) and "'ftp://host'" in told
    monkeypatch.setenv("DECONV_DATA_URL", "")
    assert main.build_script().parser.defaults()["data_url"] is None
    for wrong in ("host/files", "https://", "file://", "/data"):
        assert f"got {wrong!r}" in refusal(capsys, f"--data-url {wrong}")
