"""Flags of the scripts: spelling, aliases, defaults, ranges and help."""

import shlex
from inspect import signature

import pytest

import main
import main_imagenet
from deconv import FastDeconv
from deconv.conv import MODES, ROOTS
from deconv.ops.blocks import LAYOUTS
from deconv.ops.normalize import INPUT_NORMS
from util.cli.settings import choose_layers, read_settings
from util.training.optim import LOSSES, OPTIMIZERS, SCHEDULES

PUBLISHED_DEFAULTS = """
    --arch vgg11 --dataset cifar10 --epochs 100 --batch-size 512 --loss CE --optimizer SGD --lr .1
    --lr-scheduler cosine --momentum .9 --wd 5e-4 --milestone .4 --multistep-gamma .1 --seed 0
    --deconv False --mode 5 --num-groups 16 --eps 1e-2 --deconv-iter 5 --stride 3 --data ./data
    --dropout-rate 0 --save-plot True --tensorboardX True --msg False
"""
OUT_OF_RANGE = [
    *("--lr 0", "--lr nan", "--momentum 1", "--wd -1", "--eps 0", "--dropout-rate 1"),
    *("--batch-size 0", "--epochs 0", "--max-steps 0", "--num-workers -1", "--threads 0"),
    *("--mode 6", "--method 5", "--num-groups 0", "--num-groups-final -1", "--deconv-iter 0"),
    *("--stride 0", "--seed -1", "--print-freq 0", "--checkpoint-epoch -1", "--stem-iter 0"),
    *("--image-size 31", "--milestone 0", "--multistep-gamma 0", "--deconv perhaps"),
    *("--arch vgg12", "--dataset cifar", "--optimizer sgd", "--loss L1", "--preset best"),
    *("--lr-scheduler sine", "--layout random", "--deconv-iter 16", "--stem-iter 16"),
    *("--threads 999999999999", "--batch-size 100000000000000000000", "--num-workers 2000"),
    *("--epochs 1e9", "--eps 1e-13", "--milestone 1e-9", "--multistep-gamma 1.5"),
    *("--label-smoothing 1", "--random-erase 1.1", "--mixup -1", "--cutmix 101"),
    *("--mixup nan", "--auto-augment randaugment"),
    *("--lr 1e+300", "--wd 1e+300", "--eps 1e+300"),  # beyond float32
]


def typed(line, script=main):
    return script.build_script().parser.parse_typed(line.split())


def refusal(capsys, line):
    """Return the one line that refuses a command line."""
    with pytest.raises(SystemExit) as stop:
        typed(line)
    assert stop.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("main.py: error: ")
    return message


def help_of(script, capsys):
    with pytest.raises(SystemExit) as stop:
        typed("--help", script)
    assert stop.value.code == 0
    return capsys.readouterr().out


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


def test_values_out_of_range_are_refused_by_name(capsys):
    for line in OUT_OF_RANGE:
        message = refusal(capsys, line)
        assert all(word in message for word in line.split()), message


def test_paths_without_a_name_are_refused(capsys):
    for flag in ("--data", "--out", "--run-dir", "--resume"):
        assert flag in refusal(capsys, f"{flag}=")
        assert flag in refusal(capsys, f"{flag}=a\0b")


def test_unknown_and_shortened_flags_are_refused(capsys):
    assert "--momentums" in refusal(capsys, "--momentums .5")
    assert "--num-group" in refusal(capsys, "--num-group 8")
    for line, names in (
        ("--decnov True", "--deconv"),
        ("--decnov=True", "--deconv"),
        ("--steps 5", "--max-steps or --accum-steps or --checkpoint-steps"),
        ("--batch 8", "--batchnorm or --batch-size"),
    ):
        assert refusal(capsys, line).endswith(f"did you mean {names}?")
    assert "did you mean" not in refusal(capsys, "--zzz")


def test_arch_help_and_a_wrong_name_list_the_architectures(capsys):
    with pytest.raises(SystemExit) as stop:
        typed("--arch help")
    assert stop.value.code == 0
    listed = capsys.readouterr().out
    wrong = refusal(capsys, "--arch lenet9")
    for name in main.ARCHITECTURES:
        assert name in listed and name in wrong


@pytest.mark.parametrize("script", [main, main_imagenet], ids=lambda script: script.__name__)
def test_help_groups_the_flags_and_names_the_choices(capsys, script):
    text = help_of(script, capsys)
    titles = ["network", "deconvolution", "data", "training", "device", "output"]
    titles += [f"advanced: {name}" for name in ("deconvolution", "training and output")]
    positions = [text.index(f"\n{title}:\n") for title in titles]
    assert positions == sorted(positions)
    assert max(map(len, text.splitlines())) <= 100
    if script is main:
        assert main.PRESETS["paper"] in " ".join(text.split())
    for choice in (*LOSSES, *OPTIMIZERS, *SCHEDULES, *LAYOUTS, *ROOTS):
        assert choice in text


@pytest.mark.parametrize("script", [main, main_imagenet], ids=lambda script: script.__name__)
def test_help_ends_in_four_commands_that_are_accepted(capsys, script):
    examples = help_of(script, capsys).partition("\nexamples:\n")[2].strip().splitlines()
    assert len(examples) == 4
    for line in examples:
        argv = shlex.split(line.partition(f" {script.__name__}.py ")[2])
        assert argv, line
        if "--resume" in argv:
            script.build_script().parser.parse_typed(argv)
        else:
            read_settings(script.build_script(), argv)


@pytest.mark.parametrize("script", [main, main_imagenet], ids=lambda script: script.__name__)
def test_every_true_or_false_flag_may_be_typed_bare(script):
    parser = script.build_script().parser
    bare = [name for name in parser.spelling if f"{parser.spelling[name]} [BOOL]" in usage(parser)]
    assert {"deconv", "batchnorm", "compile", "evaluate", "msg"} <= set(bare)
    for name in bare:
        flag = parser.spelling[name]
        assert typed(flag, script) == typed(f"{flag} True", script) == {name: True}
        assert typed(f"{flag} False --seed 1", script) == {name: False, "seed": 1}
        assert typed(f"{flag} --seed 1", script) == {name: True, "seed": 1}


def usage(parser):
    """Return the usage with the long spelling of each flag."""
    text = parser.format_usage()
    return text.replace("-e [BOOL]", "--evaluate [BOOL]")


def test_a_folder_is_not_taken_for_the_value_of_a_flag():
    for line in ("--deconv DIR", "DIR --deconv", "--deconv True DIR", "-b 2 --deconv DIR -j 0"):
        flags = typed(line, main_imagenet)
        assert (flags["data"], flags["deconv"]) == ("DIR", True)
    assert typed("-e DIR --gpu 0", main_imagenet) == {"evaluate": True, "data": "DIR", "gpu": 0}
    flags = typed("--milestone .4 .8 DIR", main_imagenet)
    assert flags == {"milestone": [0.4, 0.8], "data": "DIR"}


def test_choices_are_those_of_the_layers():
    for layout in LAYOUTS:
        assert typed(f"--layout {layout}") == {"layout": layout}
    for mode in MODES:
        assert typed(f"--mode {mode}") == {"mode": mode}
    for root in ROOTS:
        assert typed(f"--root {root}") == {"root": root}
        assert typed(f"--root-final {root}") == {"root_final": root}
    for norm, keyword in zip(("none", "layernorm", "l1norm"), INPUT_NORMS, strict=True):
        flags = read_settings(main.build_script(), ["--deconv", "True", "--norm-type", norm])[0]
        assert choose_layers(flags)["input_norm"] == keyword


def test_defaults_are_those_of_the_layers():
    flags, keywords = main.build_script().parser.defaults(), signature(FastDeconv).parameters
    names = {"share_blocks": "shared", "num_groups": "block", "deconv_iter": "n_iter"}
    names |= {name: name for name in ("mode", "eps", "layout", "root", "rows_per_feature")}
    names |= {"norm_type": "input_norm", "freeze": "freeze", "freeze_iter": "freeze_iter"}
    names["stride"] = "sampling_stride"
    for flag, keyword in names.items():
        assert flags[flag] == keywords[keyword].default, flag


def test_a_mirror_is_named_by_flag_or_variable(monkeypatch, capsys):
    monkeypatch.setenv("DECONV_DATA_URL", "file:///data/archives")
    assert main.build_script().parser.defaults()["data_url"] == "file:///data/archives"
    assert typed("--data-url http://host/files") == {"data_url": "http://host/files"}
    monkeypatch.setenv("DECONV_DATA_URL", "ftp://host")
    with pytest.raises(SystemExit):
        main.build_script().parser.defaults()
    message = capsys.readouterr().err
    assert "argument --data-url: " in message and "'ftp://host'" in message
    monkeypatch.setenv("DECONV_DATA_URL", "")
    assert main.build_script().parser.defaults()["data_url"] is None
    for wrong in ("host/files", "https://", "file://", "/data"):
        assert f"got {wrong!r}" in refusal(capsys, f"--data-url {wrong}")
