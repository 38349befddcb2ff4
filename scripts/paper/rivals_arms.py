"""Define the networks, arms and learning rates of `rivals.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Network:
    """A network and its budget.

    Args:
        title: name in tables.
        optimizer: of the arms that have none of their own.
        batch_size, steps, epochs: of a run.
        flags: of its recipe.
        rates: all learning rates by optimizer, in order; the search begins with the middle three.
    """

    title: str
    optimizer: str
    batch_size: int
    steps: int
    epochs: int
    flags: str
    rates: dict[str, tuple[float, ...]]


PLAIN_RATES = {
    "SGD": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "AdamW": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "Muon": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
AIRBENCH_RATES = {
    "SGD": (0.1, 0.3, 1.0, 3.0, 10.0),
    "AdamW": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "Muon": (0.06, 0.12, 0.24, 0.48, 0.96),
}
BFLOAT16 = " --amp bf16 --channels-last True"
STEPS = 150  # of VGG-11 and ResNet-18, less than an epoch
SHORT = f"{BFLOAT16} --max-steps {STEPS}"
NETWORKS = {
    "vgg11": Network("VGG-11", "SGD", 128, STEPS, 1, SHORT, PLAIN_RATES),
    "resnet18": Network("ResNet-18", "SGD", 128, STEPS, 1, SHORT, PLAIN_RATES),
    "airbench": Network(
        "airbench",
        "Muon",
        2000,
        50,
        2,
        f" --recipe airbench --lr-scheduler linear --label-smoothing 0.2 --print-freq 2{BFLOAT16}",
        AIRBENCH_RATES,
    ),
}
# L2 penalty of SGD. AdamW has main.py's default; so has Muon, or none in the recipe of airbench.
DECAYS = {"SGD": " --wd 5e-4", "AdamW": "", "Muon": ""}


@dataclass(frozen=True)
class Arm:
    """A kind of layers with an optimizer.

    Args:
        layers: words for tables.
        kind: kind of layers, which has one colour in plots.
        flags: of the layers.
        optimizers: by network; elsewhere the network's own.
        recipe: flags of the recipe of airbench: the rates of the last layer and of the biases.
        slowdown: of a step by network, relative to `costs.py`; a guess by layer arithmetic.
    """

    layers: str
    kind: str
    flags: str
    optimizers: Mapping[str, str] = field(default_factory=dict)
    recipe: str = ""
    slowdown: tuple[float, float, float] = (1.0, 1.0, 1.0)


BATCHNORM, DECONV = "--deconv False", "--deconv True"
RIVAL = "--deconv False --batchnorm False --rival"
SGD, ADAMW, MUON = (dict.fromkeys(NETWORKS, name) for name in ("SGD", "AdamW", "Muon"))
# The recipe's rate of the last layer is tuned for features behind BatchNorm, which are larger than
# whitened ones; see docs/experiments.md, 31.
WHITENED_HEAD = " --head-rate 6"
SLOW_MUON = (1.6, 1.25, 1.0)  # by the iteration on large matrices after few images
ARMS = {
    "bn-sgd": Arm("BatchNorm", "bn", BATCHNORM, SGD),
    "bn-adamw": Arm("BatchNorm", "bn", BATCHNORM, ADAMW),
    "bn-muon": Arm("BatchNorm", "bn", BATCHNORM, MUON, slowdown=SLOW_MUON),
    "head-muon": Arm(
        "BatchNorm, whitened last layer",
        "head",
        f"{BATCHNORM} --num-groups-final 512",
        MUON,
        recipe=WHITENED_HEAD,
        slowdown=SLOW_MUON,
    ),
    # Without a norm, the recipe of airbench diverges at its rates of biases and of the last layer.
    "ws": Arm(
        "no norm, weight standardisation",
        "ws",
        f"{RIVAL} weight-standardization",
        {"airbench": "AdamW"},
    ),
    "gn": Arm("GroupNorm", "gn", f"{RIVAL} group-norm"),
    "iternorm": Arm("IterNorm", "iternorm", f"{RIVAL} iter-norm", slowdown=(1.4, 1.4, 1.4)),
    "decorrelation": Arm(
        "decorrelated inputs, BatchNorm",
        "decorrelation",
        f"{BATCHNORM} --rival decorrelation --cuda-graphs False",
        ADAMW,
        slowdown=(3.5, 2.0, 1.5),
    ),
    "deconv-sgd": Arm("deconvolution", "deconv", DECONV, SGD, recipe=WHITENED_HEAD),
    "deconv-adamw": Arm("deconvolution", "deconv", DECONV, ADAMW),
    "deconv-muon": Arm(
        "deconvolution", "deconv", DECONV, MUON, recipe=WHITENED_HEAD, slowdown=SLOW_MUON
    ),
    "outnorm": Arm(
        "deconvolution, outputs of unit variance",
        "outnorm",
        f"{DECONV} --rival output-norm",
        recipe=WHITENED_HEAD,
    ),
}
Case = tuple[str, str]  # network, arm


def find_optimizer(case: Case) -> str:
    """Return the optimizer of an arm on a network."""
    network, arm = case
    return ARMS[arm].optimizers.get(network, NETWORKS[network].optimizer)


def make_flags(case: Case, rate: float, seed: int) -> str:
    """Return the flags of a run, without those of images and folders."""
    network, arm, optimizer = NETWORKS[case[0]], ARMS[case[1]], find_optimizer(case)
    flags = f"--arch {case[0]} {arm.flags} --optimizer {optimizer} --lr {rate:g} --seed {seed}"
    flags += f"{DECAYS[optimizer]} --batch-size {network.batch_size} --epochs {network.epochs}"
    return flags + network.flags + (arm.recipe if case[0] == "airbench" else "")


def name_run(case: Case, rate: float, seed: int) -> str:
    return f"{'-'.join(case)}-lr{rate:g}-seed{seed}"
