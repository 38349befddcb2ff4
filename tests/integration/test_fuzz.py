"""Random combinations of flags, drawn by hypothesis, train or are refused by name."""

import io
import json
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import main
import main_imagenet
from util.device import choose_algorithms

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as draw  # noqa: E402

ALWAYS = "--max-steps 2 --use-gpu False --tensorboard False --save-plot False"
FIXED = {
    main: "--dataset digits --arch simple_v2 --batch-size 128",
    main_imagenet: "--dummy --image-size 32 -b 4 -j 0 -a resnet18d --test-run True --test-iter 2",
}
# Valid values, values that are valid with other flags only, and invalid ones. An empty value is a
# bare flag. Left out are flags that take minutes (--compile), the network, other machines or much
# memory.
VALUES = {
    "--deconv": "True False ",
    "--batchnorm": "True False ",
    "--bias": "True False",
    "--dropout-rate": ".5 1",
    "--mode": "1 2 3 4 5 0",
    "--block": "1 7 64 999999999",
    "--block-fc": "0 32 -1",
    "--eps": "1e-12 1e-5 1 1e35 0",
    "--deconv-iter": "1 15 16",
    "--stem-iter": "2 16",
    "--stride": "1 3 999999999",
    "--rows-per-feature": "0 .1 2 1e300 nan",
    "--root": "newton resolvent cholesky none",
    "--layout": "contiguous interleaved",
    "--share-blocks": "True False ",
    "--norm-type": "none layernorm l1norm l2norm",
    "--freeze": "True False ",
    "--freeze-iter": "1 100 0",
    "--sync-stats": "True False",
    "--batch-size": "1 17 500 0",
    "--loss": "CE L2",
    "--optimizer": "SGD Adam AMSGrad AdamW Muon",
    "--accum-steps": "1 3 500 0",
    "--clip-grad": "1e-3 1e30 0",
    "--ema": ".3 .999 1",
    "--no-decay-norm-bias": "True False ",
    "--momentum": "0 .9 1",
    "--lr": "1e-3 1e30 1e300 nan",
    "--wd": "0 1e30 -1",
    "--lr-scheduler": "cosine multistep step",
    "--milestone": ".5 .001 60",
    "--multistep-gamma": "1e-300 .5 1 2",
    "--scheduler-step-size": "1 50",
    "--warmup-epochs": ".001 .5 1e300",
    "--seed": "0 4611686018427387904 -1",
    "--threads": "1 0",
    "--amp": "off bf16 fp16",
    "--channels-last": "True False",
    "--deterministic": "True False ",
    "--image-size": "32 33 31",
    "--checkpoint-steps": "1 2 9",
    "--checkpoint-epoch": "1 99",
    "--start-epoch": "0 1 -1",
    "--epochs": "1 2 999999999",
    "--print-freq": "1 0",
    "--msg": "True maybe ",
    "--resume": "auto missing",
    "--gpu": "0",
    "--rank": "0 1",
    "--world-size": "1",
    "--dist-url": "env:// tcp://host host:1",
    "--dist-backend": "gloo nccl",
    "--on-bad-image": "error skip",
    "--out": "elsewhere",
    "--nonsense": "1",
}
OWN = {
    main: {
        "--arch": "simple_v1 simple_v2 mlp vgg",
        "--method": "1 2 3 4 5",
        "--preset": "paper best",
        "--data": "elsewhere",
        "--data-url": "https://host host",
        "--dataset": "digits folder",
        "--evaluate": " False",
    },
    main_imagenet: {
        "--arch": "resnet18d resnet18 squeezenet1_1 vgg timm/none",
        "--test-iter": "1 3 0",
        "--evaluate": " False",
        "elsewhere": "",
    },
}


def choices(script):
    """Return a strategy of up to six flags, each with one of its values."""
    known = {name: text.split(" ") for name, text in (VALUES | OWN[script]).items()}
    flag = draw.sampled_from(sorted(known)).flatmap(
        lambda name: draw.tuples(draw.just(name), draw.sampled_from(known[name]))
    )
    return draw.lists(flag, max_size=6, unique_by=lambda drawn: drawn[0])


def check(script, drawn):
    """Check that two steps are made, or fewer if the run is shorter, or one line names a flag."""
    words = [word for pair in drawn for word in pair if word]
    fixed = f"{FIXED[script]} {ALWAYS}".split()
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(out), redirect_stderr(err):
        run_dir = Path(folder, "run")
        try:
            script.main([*fixed, *words, "--run-dir", str(run_dir)])
        except SystemExit as end:
            message = err.getvalue()
            assert (
                message.startswith(f"{script.__name__}.py: error: ") and message.count("\n") == 1
            ), message
            assert (end.code == 2 and names_one(message, words)) or (
                end.code == 1 and "diverged at epoch" in message
            ), message
        else:
            assert not err.getvalue()
            summary = json.loads((run_dir / "summary.json").read_text())
            limits = [int(drawn[1]) for drawn in drawn if drawn[0] in ("--epochs", "--test-iter")]
            assert summary["steps"] == 2 or summary["steps"] in limits
        finally:
            choose_algorithms(False)


def names_one(message, words):
    """Return whether a message names one of the words, or a flag in another spelling."""
    return "--" in message or any(word in message for word in words)


OPTIONS = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=8, derandomize=True, **OPTIONS)
@given(choices(main))
def test_flags_of_main_train_or_are_refused_by_name(drawn):
    check(main, drawn)


@settings(max_examples=4, derandomize=True, **OPTIONS)
@given(choices(main_imagenet))
def test_flags_of_main_imagenet_train_or_are_refused_by_name(drawn):
    check(main_imagenet, drawn)


@pytest.mark.slow
@settings(max_examples=500, **OPTIONS)
@given(choices(main))
def test_many_more_flags_of_main_train_or_are_refused_by_name(drawn):
    check(main, drawn)


@pytest.mark.slow
@settings(max_examples=200, **OPTIONS)
@given(choices(main_imagenet))
def test_many_more_flags_of_main_imagenet_train_or_are_refused_by_name(drawn):
    check(main_imagenet, drawn)
