# PYTHON_ARGCOMPLETE_OK: lets shells complete flags, see docs/train.md
"""Train an image classifier, with BatchNorm or with deconvolution: `python main.py --help`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from models import (
    ARCHITECTURES,
    Layers,
    build_model,
    describe_architectures,
    init_from_images,
    make_layers,
    model_hooks,
    take_weights,
)
from util.cli import flags
from util.cli.launch import start
from util.cli.parser import Parser
from util.cli.script import PRESETS, Rules, Script
from util.cli.settings import choose_layers
from util.data.datasets import DATASETS, build_loaders, is_downloaded, is_embedded
from util.data.images import DataSpec
from util.data.known_classes import build_test_loader
from util.data.loader import ImageLoader
from util.random_state import seed_everything
from util.training.hooks import ModelHooks
from util.training.initial import start_from
from util.training.session import RunContext, evaluate_only, fit


def main(argv: Sequence[str] | None = None) -> None:
    """Train or test; exit with 2 for bad input, 1 if training diverged, 128 + signal."""
    start(__file__, build_script(), train, argv)


def train(context: RunContext) -> None:
    """Run flags -> data -> layers -> model -> fit, or one test with -e."""
    flags = context.flags
    data = context.world.rank0_first(partial(load_images, context))  # rank 0 may download
    seed_everything(flags.seed)
    model = build_network(flags, data[0])
    hooks = ModelHooks(**model_hooks(), take_weights=take_weights)
    if flags.evaluate:
        evaluate_only(context, data, model, hooks=hooks)
    else:
        if not flags.resume:
            init_from_images(model, data[1].draw_images)
        if flags.init and not flags.resume:
            start_from(context, model, data[1], hooks, partial(build_network, spec=data[0]))
        fit(context, data, model, hooks=hooks)


def build_script() -> Script:
    """Return the command line of this script and its rules."""
    description = "Train an image classifier, with BatchNorm or with deconvolution."
    parser = Parser("main.py", description, flags.EXAMPLES)
    add = flags.add_network_flags(parser, ARCHITECTURES, describe_architectures, "vgg11")
    flags.add_method_flag(add)
    flags.add_deconv_flags(parser, final_block=512)
    flags.add_data_flags(parser, DATASETS)
    flags.add_training_flags(parser, PRESETS, epochs=100, batch_size=512, weight_decay=5e-4)
    flags.add_device_flags(parser)
    flags.add_output_flags(parser)
    flags.add_advanced_flags(parser)
    return Script(parser, ARCHITECTURES, rules=data_rules)


def data_rules(flags: Namespace) -> Rules:
    """Yield each flag about the images, whether its value is allowed, and the error if not."""
    name = flags.dataset
    yield "data", not is_embedded(name), f"does not apply to {name}, which is embedded"
    yield "data_url", is_downloaded(name), f"does not apply to {name}, which is not downloaded"
    for flag in ("on_bad_image", "max_image_pixels", "cache_dir"):
        yield flag, name == "folder", "needs --dataset folder"
    yield "cache_dir", not flags.evaluate, "has no effect with -e, which reads the test images once"
    yield "evaluate", flags.resume or not flags.evaluate, "needs --resume RUN"


def load_images(context: RunContext) -> tuple[DataSpec, ImageLoader | None, ImageLoader]:
    """Return the description of the dataset, the training loader and the test loader."""
    flags, cache_dir = context.flags, Path(context.flags.out).expanduser()
    options = context.loader_options()
    if flags.evaluate and flags.dataset == "folder":
        spec = DataSpec(**context.saved["spec"])
        return spec, None, build_test_loader(spec, flags.data, options)
    return build_loaders(
        flags.dataset,
        flags.data,
        options,
        cache_dir=cache_dir,
        mirror=flags.data_url,
        image_cache=flags.cache_dir,
    )


def build_network(flags: Namespace, spec: DataSpec, layers: Layers | None = None) -> nn.Module:
    """Build the model that the flags describe, with their layers or others."""
    return build_model(
        flags.arch,
        layers or make_layers(**choose_layers(flags)),
        in_channels=spec.in_channels,
        num_classes=spec.num_classes,
        image_size=spec.image_size,
        method=flags.method,
        dropout_rate=flags.dropout_rate,
    )


if __name__ == "__main__":
    main()
