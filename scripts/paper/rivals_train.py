"""Train one arm of the comparison with rivals: main.py with other layers or another recipe.

    python scripts/paper/rivals_train.py --arch vgg11 --rival iter-norm --batchnorm False
    python scripts/paper/rivals_train.py --arch airbench --recipe airbench --lr-scheduler linear

`--rival` replaces layers of the network, see `rivals_layers/`. `--stats-momentum` is the momentum
of the running statistics of deconvolutions. `--recipe airbench` takes optimizer, schedule and
augmentation from `airbench.py`, and tests the trained network on six views of each image;
`--bias-rate` and `--head-rate` change two of its rates. All other flags are those of main.py.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import main as main_script
from deconv import FastDeconv
from models import Layers, init_from_images, make_layers, model_hooks
from scripts.paper import airbench
from scripts.paper.rivals_layers.decorrelation import (
    DecorrelatedConv2d,
    DecorrelatedLinear,
    decorrelate,
)
from scripts.paper.rivals_layers.iter_norm import IterNorm
from scripts.paper.rivals_layers.output_norm import NormalizedDeconv, normalize_behind_pooling
from scripts.paper.rivals_layers.weight_standardization import StandardizedConv2d
from util.cli.launch import start
from util.cli.parser import bounded_float
from util.cli.script import Rules, Script
from util.cli.settings import choose_layers
from util.console import print_line
from util.data.images import DataSpec
from util.data.loader import ImageLoader
from util.errors import RunError
from util.files import atomic_write
from util.random_state import seed_everything
from util.training.engine import evaluate
from util.training.hooks import ModelHooks
from util.training.session import Builders, RunContext, fit

NETWORKS = ("vgg11", "resnet18", "airbench")
AIRBENCH = "airbench"  # network and recipe
POOLED = "output-norm-pooled"
BEHIND = "batchnorm-behind"
GROUPS = 32  # of GroupNorm
VIEWS_NAME = "views.json"  # in the folder of a run: test top-1 on six views, in percent
# Rates of the recipe of airbench beside --lr: flag, parameters, default.
OWN_RATES = (
    ("bias", "biases and norms", airbench.BIAS_RATE),
    ("head", "the last layer", airbench.HEAD_RATE),
)
# Flags that the recipe of airbench replaces.
REPLACED = ("momentum", "warmup_epochs", "no_decay_norm_bias")


def main(argv: Sequence[str] | None = None) -> None:
    """Train; exit codes are those of main.py."""
    start(__file__, build_script(), train, argv)


def build_script() -> Script:
    """Return the command line of main.py with five more flags, and the rules."""
    script = main_script.build_script()
    script.parser.prog = "rivals_train.py"
    add = script.parser.add_group("rivals")
    add("--rival", "layers of the network", None, "none", choices=("none", *RIVALS))
    text = "weight of a batch in the running statistics of deconvolutions"
    add("--stats-momentum", text, bounded_float(above=0, maximum=1), 0.1, metavar="M")
    text = "main: the optimizer and images of main.py; airbench: those of airbench"
    add("--recipe", text, None, "main", choices=("main", AIRBENCH))
    for name, what, rate in OWN_RATES:
        text = f"learning rate of {what} in --recipe {AIRBENCH}, per image of a batch"
        add(f"--{name}-rate", text, bounded_float(above=0), rate, metavar="LR")
    return replace(script, rules=lambda flags: chain(script.rules(flags), own_rules(flags)))


def own_rules(flags: Namespace) -> Rules:
    """Yield the rules of this script's own flags: flag, True if its value is allowed, error."""
    for name in ("evaluate", "init"):
        yield name, False, "is an option of main.py only"
    yield "arch", flags.arch in NETWORKS, f"is not offered here: choose {', '.join(NETWORKS)}"
    if flags.rival in ("output-norm", POOLED, BEHIND):
        yield "rival", flags.deconv, "needs --deconv True"
        yield "rival", flags.rival != POOLED or flags.arch == AIRBENCH, f"needs --arch {AIRBENCH}"
    elif flags.rival != "none":
        yield "rival", not flags.deconv, "contradicts --deconv True; leave one of them out"
        keeps_norm = flags.rival == "decorrelation"
        fault = "replaces BatchNorm, needs --batchnorm False"
        yield "rival", keeps_norm or not flags.batchnorm, fault
    yield "stats_momentum", flags.deconv, "needs --deconv True"
    yield "recipe", flags.recipe == "main" or flags.arch == AIRBENCH, f"needs --arch {AIRBENCH}"
    is_linear = flags.recipe == "main" or flags.lr_scheduler == "linear"
    yield "recipe", is_linear, "needs --lr-scheduler linear"
    takes_decay = flags.recipe == "main" or flags.optimizer != "Muon"
    yield "weight_decay", takes_decay, f"has no effect on Muon in --recipe {AIRBENCH}; leave it out"
    for name in REPLACED:
        yield name, flags.recipe == "main", f"is set by --recipe {AIRBENCH}; leave it out"
    for name, *_ in OWN_RATES:
        yield f"{name}_rate", flags.recipe == AIRBENCH, f"needs --recipe {AIRBENCH}"
        yield f"{name}_rate", flags.optimizer != "AdamW", "has no effect on AdamW; leave it out"
    known = flags.recipe == "main" or flags.optimizer in ("SGD", "AdamW", "Muon")
    yield "optimizer", known, f"is not offered by --recipe {AIRBENCH}: choose SGD, AdamW or Muon"


def replace_norm(norm: Callable[..., nn.Module], layers: Layers, arch: str) -> Layers:
    return replace(layers, norm=norm)


def make_group_norm(channels: int, **options: Any) -> nn.Module:
    return nn.GroupNorm(GROUPS, channels)


def make_iter_norm(channels: int, momentum: float = 0.1, **options: Any) -> nn.Module:
    return IterNorm(channels, momentum=momentum)


def standardize(layers: Layers, arch: str) -> Layers:
    """Standardise the weights of all convolutions; gains are fixed where norms have no scale."""
    if arch == AIRBENCH:
        conv = stem = partial(StandardizedConv2d, activation="gelu", learn_gain=False)
    else:  # images are no output of an activation
        conv, stem = (partial(StandardizedConv2d, activation=name) for name in ("relu", "identity"))
    return replace(layers, conv=conv, stem=stem, norm=nn.Identity)


def decorrelate_inputs(layers: Layers, arch: str) -> Layers:
    """Decorrelate the inputs of all layers, with BatchNorm behind the convolutions."""
    conv = partial(DecorrelatedConv2d, bias=False)
    return replace(layers, conv=conv, stem=conv, linear=DecorrelatedLinear)


def normalize_behind(layers: Layers, arch: str) -> Layers:
    """Put BatchNorm behind all deconvolutions, where the network has it without deconvolution."""
    conv, stem = (partial(make, bias=False) for make in (layers.conv, layers.stem))
    return replace(layers, conv=conv, stem=stem, norm=nn.BatchNorm2d)


def normalize_outputs(layers: Layers, arch: str) -> Layers:
    """Give the outputs of all deconvolutions unit variance."""
    makers = {"conv": layers.conv, "stem": layers.stem}
    return replace(
        layers, **{name: partial(make_normalized, make) for name, make in makers.items()}
    )


def make_normalized(make: Callable[..., FastDeconv], *shape: int, **geometry: Any) -> nn.Module:
    return NormalizedDeconv.from_deconv(make(*shape, **geometry))


RIVALS: dict[str, Callable[[Layers, str], Layers]] = {
    "weight-standardization": standardize,
    "group-norm": partial(replace_norm, make_group_norm),
    "iter-norm": partial(replace_norm, make_iter_norm),
    "decorrelation": decorrelate_inputs,
    BEHIND: normalize_behind,
    "output-norm": normalize_outputs,
    POOLED: lambda layers, arch: layers,  # changes the network, see `build_network`
}


def train(context: RunContext) -> None:
    """Run flags -> data -> layers -> model -> fit, then test on six views."""
    flags = context.flags
    if context.world.size > 1:
        raise RunError("rivals_train.py trains in one process: choose one GPU by --gpu N")
    if flags.rival == "decorrelation" and context.build_accelerator().cuda_graphs:
        raise RunError(
            "--rival decorrelation: keeps images for its update, which CUDA graphs do not; add "
            "--cuda-graphs False"
        )
    spec, train_loader, test_loader = main_script.load_images(context)
    hooks = ModelHooks(**model_hooks())
    seed_everything(flags.seed)
    model = build_network(flags, spec)
    if not flags.resume:
        init_from_images(model, train_loader.draw_images)
    if flags.recipe == AIRBENCH:
        train_loader = augment_as_airbench(train_loader, context)
    fit(
        context,
        (spec, train_loader, test_loader),
        model,
        hooks=hooks,
        builders=choose_builders(flags),
    )
    if flags.recipe == AIRBENCH:
        top1 = test_views(context, test_loader, hooks.eval_model(model.eval()))
        print_line(f"test top1 {top1:.2f}% on six views")
        if context.run_dir:
            with atomic_write(context.run_dir / VIEWS_NAME) as file:
                file.write(json.dumps({"views_top1": top1}).encode())


def build_network(flags: Namespace, spec: DataSpec) -> nn.Module:
    """Build the network that the flags describe."""
    own = {"momentum": flags.stats_momentum} if flags.deconv else {}
    layers = make_layers(**choose_layers(flags), **own)
    if flags.rival != "none":
        layers = RIVALS[flags.rival](layers, flags.arch)
    model = main_script.build_network(flags, spec, layers)
    if flags.rival == POOLED:
        for group in model.groups:
            normalize_behind_pooling(group)
    return model


def choose_builders(flags: Namespace) -> Builders:
    """Return the functions that make optimizer and schedule; each step updates decorrelations."""
    builders = Builders()
    if flags.recipe == AIRBENCH:
        builders = Builders(airbench.build_optimizer, airbench.build_scheduler)

    def build_optimizer(flags: Namespace, model: nn.Module) -> Optimizer:
        optimizer = builders.optimizer(flags, model)
        optimizer.register_step_post_hook(lambda *_: decorrelate(model))
        return optimizer

    return replace(builders, optimizer=build_optimizer)


def augment_as_airbench(loader: ImageLoader, context: RunContext) -> ImageLoader:
    """Return a loader of the same training images with the augmentation of airbench."""
    dataset, options = loader.dataset, context.loader_options()
    own = {"train": True, "augmentation": airbench.AlternatingFlip()}
    augmented = ImageLoader(dataset.spec, dataset.split, options, **own)
    augmented.validation = loader.validation
    return augmented


def test_views(context: RunContext, loader: ImageLoader, model: nn.Module) -> float:
    """Return the test top-1 in percent, each image seen in six views."""
    criterion, accelerator = nn.CrossEntropyLoss(), context.build_accelerator()
    views = airbench.SixViews(model)
    return evaluate(views, loader, criterion, accelerator=accelerator, title="six views")["top1"]


if __name__ == "__main__":
    main()
