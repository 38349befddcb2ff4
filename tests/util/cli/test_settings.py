"""Presets, defaults that follow from other flags, and flags that would do nothing."""

import pytest

import main
import main_imagenet
from tests.states import make_state
from util.checkpoint.store import save_checkpoint
from util.cli.inherited import OF_THIS_MACHINE, check_config, inherit_flags
from util.cli.parser import mirror_url, path_name, rendezvous_url
from util.cli.script import PRESETS
from util.cli.settings import read_settings
from util.errors import CheckpointError


def test_runs_from_before_root_final_keep_the_steps_in_their_linear_layers():
    script, config = main.build_script(), {"arch": "vgg11", "root": "cholesky"}
    check_config(script, config, "FILE")
    inherited = inherit_flags({"config": config, "progress": {"step": 0}}, (), script.parser)
    assert inherited == {"arch": "vgg11", "root": "cholesky", "root_final": "newton"}
    assert read("--arch vgg11 --deconv True").root_final is None


def test_a_run_stopped_in_the_test_after_its_max_steps_keeps_them():
    parser = main.build_script().parser
    for tested, inherited in ((5, {"max_steps": 8}), (8, {})):
        saved = {"config": {"max_steps": 8}, "step": 8, "progress": {"step": tested}}
        assert inherit_flags(saved, (), parser) == inherited


def test_a_run_with_layers_of_another_script_is_refused():
    script = main.build_script()
    check_config(script, {"arch": "vgg11", "rival": "none"}, "FILE")
    with pytest.raises(CheckpointError, match="FILE: has the layers of --rival output-norm; only"):
        check_config(script, {"arch": "vgg11", "rival": "output-norm"}, "FILE")


def read(line):
    flags, saved = read_settings(main.build_script(), line.split())
    assert saved is None
    return flags


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {"deconv": False, "batchnorm": True, "bias": False, "num_groups_final": 0}),
        (
            "--deconv True",
            {"deconv": True, "batchnorm": False, "bias": True, "num_groups_final": 512},
        ),
        ("--batchnorm False", {"batchnorm": False, "bias": True}),
        ("--deconv True --num-groups-final 0", {"num_groups_final": 0}),
        ("--num-groups-final 256 --eps 1e-3", {"num_groups_final": 256, "eps": 1e-3}),
        ("--arch simple_v1", {"method": 1, "deconv": False, "num_groups_final": None}),
        ("--arch simple_v1 --deconv True", {"method": 3, "deconv": True}),
        ("--arch simple_v1 --method 2", {"method": 2, "deconv": True, "batchnorm": False}),
        ("--arch mlp --batchnorm True", {"method": 1, "batchnorm": True}),
        ("", {"lr": 0.1, "weight_decay": 5e-4}),
        ("--optimizer AdamW", {"lr": 1e-3, "weight_decay": 1e-2}),
        ("--optimizer Muon --lr .01", {"lr": 0.01, "weight_decay": 1e-2}),
        ("--optimizer Muon --preset paper", {"lr": 1e-3, "weight_decay": 1e-3}),
        ("", {"out": "./runs"}),
        ("--run-dir here/run", {"out": "here"}),
    ],
)
def test_defaults_follow_from_other_flags(line, expected):
    flags = vars(read(line))
    assert {name: flags[name] for name in expected} == expected


def test_preset_sets_the_papers_values_and_typed_flags_win():
    flags = vars(read("--preset paper --deconv True"))
    preset = main.build_script().parser.parse_typed(PRESETS["paper"].split())
    assert {name: flags[name] for name in preset} == preset and len(preset) == 8
    flags = read("--preset paper --deconv True --eps .01 --wd 0 --stem-iter 5")
    assert (flags.eps, flags.weight_decay, flags.stem_iter) == (0.01, 0, 5)
    assert (flags.batch_size, flags.num_groups, flags.deconv_iter) == (128, 64, 5)


def test_preset_serves_batchnorm_too():
    flags = read("--preset paper --deconv False")
    assert (flags.batch_size, flags.weight_decay, flags.batchnorm) == (128, 1e-3, True)


@pytest.mark.parametrize(
    ("line", "flag", "reason"),
    [
        ("--mode 3", "--mode 3", "--deconv True"),
        ("--block 8", "--block 8", "--deconv True"),
        ("--num-groups=8", "--num-groups 8", "--deconv True"),
        ("--stride 1", "--stride 1", "--deconv True"),
        ("--stem-iter 9", "--stem-iter 9", "--deconv True"),
        ("--layout interleaved", "--layout", "--num-groups-final"),
        ("--norm-type l1norm", "--norm-type l1norm", "--num-groups-final"),
        ("--freeze True", "--freeze needs", "--deconv True"),
        ("--deconv True --freeze-iter 50", "--freeze-iter 50", "--freeze True"),
        ("--arch mlp --method 1 --freeze True", "--freeze needs", "--method 1"),
        ("--share-blocks 1", "--share-blocks needs", "--num-groups-final"),
        ("--deconv True --block-fc 0 --root-final newton", "--root-final newton", "above 0"),
        ("--deconv False --eps .1", "--eps 0.1", "--num-groups-final"),
        ("--deconv-iter 7", "--deconv-iter 7", "--num-groups-final"),
        ("--deconv True --batchnorm True", "--batchnorm contradicts", "deconvolution"),
        ("--bias True", "--bias contradicts", "BatchNorm"),
        ("--deconv True --mode 4 --stride 3", "--stride 3", "every patch"),
        ("--optimizer Adam --momentum .9", "--momentum 0.9", "Adam"),
        ("--max-steps 5 --checkpoint-steps 6", "--checkpoint-steps 6", "--max-steps 5"),
        ("--optimizer AMSGrad --momentum 0", "--momentum 0.0", "AMSGrad"),
        ("--optimizer Muon --momentum .9", "--momentum 0.9", "Muon"),
        ("--milestone 60 80", "--milestone 60 80", "multistep"),
        ("--multistep-gamma .1", "--multistep-gamma 0.1", "multistep"),
        ("--lr-scheduler multistep --epochs 50 --milestone 60", "--milestone 60", "--epochs 50"),
        ("--batch-size 8 --accum-steps 9", "--accum-steps 9", "--batch-size 8"),
        ("--use-ema False", "--use-ema False", "-e --resume RUN"),
        ("--accum-steps 2 --cuda-graphs True", "--cuda-graphs contradicts", "--accum-steps 2"),
        ("--dataset digits --data D", "--data D", "embedded"),
        ("--dataset fashion-mini --data D", "--data D", "embedded"),
        ("--method 1", "--method 1", "simple_v1"),
        ("--arch resnet --dropout-rate .5", "--dropout-rate 0.5", "vgg11"),
        ("--arch simple_v1 --method 1 --deconv True", "--method 1", "contradicts --deconv True"),
        ("--arch mlp --method 3 --deconv False", "--method 3", "contradicts --deconv False"),
        ("--arch mlp --epochs 5 --checkpoint-epoch 6", "--checkpoint-epoch 6", "--epochs 5"),
        ("--arch mlp --method 3 --mode 5", "--mode 5", "--method"),
        ("--arch mlp --method 3 --num-groups 5", "--num-groups 5", "--method"),
        ("--arch simple_v1 --eps 1", "--eps 1.0", "--method 1"),
        ("--arch simple_v1 --stem-iter 1", "--stem-iter 1", "--method 1"),
        ("--arch simple_v1 --method 3 --stride 2", "--stride 2", "--method 2"),
        ("--arch mlp --method 3 --layout contiguous", "--layout", "--method 4"),
        ("--arch mlp --method 3 --share-blocks 1", "--share-blocks needs", "--num-groups-final"),
        ("--deconv True --mode 2 --block 8", "--block 8", "--share-blocks False"),
        ("--deconv True --mode 2 --layout contiguous", "--layout", "--share-blocks False"),
        ("--label-smoothing .1 --loss L2", "--label-smoothing 0.1", "--loss CE"),
        ("--mixup .001", "--mixup 0.001", "at least 0.01"),
        ("--cutmix 1 -b 1", "--cutmix 1.0", "--batch-size 2"),
        ("--run-dir R --out O", "--out O", "--run-dir"),
        ("--arch simple_v1 --num-groups-final 8", "--num-groups-final 8", "one layer"),
        ("--arch simple_v1 --batchnorm True", "--batchnorm does not", "one layer"),
        ("--multiprocessing-distributed False", "--multiprocessing-distributed", "--gpu N"),
        ("--multiprocessing-distributed --gpu 0", "--multiprocessing-distributed", "--gpu 0"),
        (
            "-e --dataset folder --cache-dir CACHE",
            "--cache-dir CACHE",
            "has no effect with -e",
        ),
    ],
)
def test_flags_without_an_effect_are_refused_by_name(capsys, line, flag, reason):
    with pytest.raises(SystemExit) as stop:
        read(line)
    assert stop.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"main.py: error: {flag}")
    assert reason in message


ACCEPTED = [
    "--loss L2 --label-smoothing 0 --mixup .2 -b 2",
    "--mixup 0 --cutmix 0 -b 1",
    "--deconv True --mode 4 --stride 1",
    "--deconv True --mode 3 --stride 2 --layout interleaved --share-blocks True",
    "--deconv True --mode 2 --num-groups 8 --layout contiguous --share-blocks False",
    "--deconv True --mode 2 --layout contiguous --num-groups-final 64",
    "--deconv True --bias False --batchnorm False",
    "--bias False --batchnorm True",
    "--batchnorm False --bias True",
    "--optimizer Adam --lr-scheduler multistep --milestone .5 .75 --multistep-gamma .2",
    "--arch simple_v1 --method 4 --eps .1 --layout interleaved",
    "--arch simple_v1 --method 2 --stride 1 --bias False",
    "--arch mlp --method 1 --num-groups-final 64 --eps .1 --norm-type layernorm",
    "--arch simple_v1 --method 2 --freeze True --freeze-iter 3",
    "--arch mlp --method 3 --num-groups-final 64 --layout interleaved --share-blocks True",
    "--dataset folder --run-dir R --out O",
    "--arch vgg11 --dropout-rate .5",
    "--evaluate False",
    "--arch resnet --dropout-rate 0",
]


def test_flags_with_an_effect_are_accepted():
    for line in ACCEPTED:
        read(line)


def test_machines_that_torchrun_has_not_started_are_not_waited_for(capsys, monkeypatch):
    """Under torchrun --world-size starts nothing: two machines would train apart, unheard."""
    line = "--world-size 2 --rank 0 --dist-url tcp://host:1"
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("GROUP_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    read(line)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    with pytest.raises(SystemExit):
        read(line)
    assert "--world-size 2 contradicts torchrun's --nnodes 1" in capsys.readouterr().err


@pytest.mark.parametrize("script", [main, main_imagenet])
def test_no_flag_that_names_a_place_is_inherited(script):
    actions = script.build_script().parser._actions
    places = {
        action.dest for action in actions if action.type in (path_name, mirror_url, rendezvous_url)
    }
    places -= {"init"}  # inherited for the record: a resumed run does not read it
    assert {"data", "out", "run_dir", "resume", "dist_url"} <= places <= OF_THIS_MACHINE


def test_a_checkpoint_chooses_neither_what_is_read_nor_where_is_written(tmp_path, capsys):
    state = make_state()
    far = str(tmp_path / "far")
    state["config"] |= {"data": far, "out": far, "run_dir": far, "data_url": f"file://{far}"}
    state["config"] |= {"resume": far, "milestone": [0.5]}
    path = save_checkpoint(state, tmp_path)
    with pytest.raises(SystemExit):
        read_settings(main.build_script(), ["--resume", str(path)])
    assert f"was trained with --data {far}; paths are not taken" in capsys.readouterr().err
    flags, _ = read_settings(main.build_script(), ["--resume", str(path), "--data", "here"])
    assert far not in vars(flags).values() and not (tmp_path / "far").exists()
    assert (flags.data, flags.out) == ("here", str(tmp_path.parent))


def test_how_a_step_is_computed_is_inherited(tmp_path):
    """It changes bits; a machine that cannot do the same has to be told."""
    state = make_state()
    state["config"] |= {"channels_last": True, "compile": True, "milestone": [0.5]}
    line = ["--resume", str(save_checkpoint(state, tmp_path))]
    flags, _ = read_settings(main.build_script(), line)
    assert flags.channels_last and flags.compile
    flags, _ = read_settings(main.build_script(), [*line, "--compile", "False"])
    assert flags.channels_last and not flags.compile


def test_a_flag_that_is_younger_than_the_checkpoint_had_its_default(tmp_path):
    state = make_state()
    state["config"] |= {"milestone": [0.5]}
    line = ["--resume", str(save_checkpoint(state, tmp_path))]
    read_settings(main.build_script(), [*line, "--norm-type", "none", "--freeze", "False"])
    for typed in (["--norm-type", "layernorm"], ["-e", "--norm-type", "l1norm"]):
        refusal = rf"{typed[-2]} is 'none' in the checkpoint, '{typed[-1]}' in this run"
        with pytest.raises(CheckpointError, match=refusal):
            read_settings(main.build_script(), [*line, *typed])
    with pytest.raises(CheckpointError, match="--freeze is False in the checkpoint, True"):
        read_settings(main.build_script(), [*line, "--freeze", "True"])


def test_a_flag_that_differs_from_the_checkpoint_is_refused_with_a_remedy(tmp_path):
    state, file = make_state(), tmp_path / "more.yaml"
    state["config"] |= {"milestone": [0.5]}
    file.write_text("seed: 7")
    path = save_checkpoint(state, tmp_path)
    line, typed = ["--resume", str(path)], ["--seed", "7"]
    for words, remedy in (
        (typed, f"leave the flag out, or start a new run with --init {path}"),
        (["-e", "--norm-type", "l1norm"], "leave the flag out"),
        (["--config", str(file)], f"leave the flag out, also of --config {file}, or start a new"),
    ):
        with pytest.raises(CheckpointError) as refusal:
            read_settings(main.build_script(), [*line, *words])
        assert remedy in str(refusal.value), words


def test_a_run_of_the_other_script_is_refused_by_its_name(tmp_path):
    state = make_state()
    state["config"] = {"epochs": state["config"]["epochs"], "arch": "resnet18d"}
    line = ["--resume", str(save_checkpoint(state, tmp_path))]
    with pytest.raises(CheckpointError, match="'resnet18d' is of main_imagenet.py; run that"):
        read_settings(main.build_script(), line)
