# PYTHON_ARGCOMPLETE_OK: lets shells complete flags, see docs/train.md
"""Train on ImageNet, or any such folder of images: `python main_imagenet.py --help`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial

from torch import nn

from models import (
    IMAGENET_ARCHITECTURES,
    build_imagenet_model,
    count_pretrained_classes,
    describe_imagenet_architectures,
    make_layers,
    model_hooks,
    take_weights,
)
from util.cli import flags
from util.cli.launch import start
from util.cli.parser import Parser, str2bool
from util.cli.script import Rules, Script
from util.cli.settings import choose_layers
from util.console import print_line
from util.data.imagenet import build_dummy_loaders, build_imagenet_loaders
from util.data.images import DataSpec
from util.data.known_classes import build_test_loader
from util.data.loader import ImageLoader
from util.errors import RunError
from util.random_state import seed_everything
from util.training.hooks import ModelHooks
from util.training.initial import CALIBRATION_BATCHES, calibrate_weights, start_from
from util.training.session import RunContext, evaluate_only, fit


def main(argv: Sequence[str] | None = None) -> None:
    """Train or test; exit with 2 for bad input, 1 if training diverged, 128 + signal."""
    start(__file__, build_script(), train, argv)


def train(context: RunContext) -> None:
    """Run flags -> data -> layers -> model -> fit, or one test with -e."""
    flags = context.flags
    data = context.world.rank0_first(partial(load_images, context))
    seed_everything(flags.seed)
    # Rank 0 first: it downloads the weights of --pretrained for all ranks.
    model = context.world.rank0_first(partial(build_network, flags, data[0]))
    max_batches = flags.test_iter if flags.test_run else sys.maxsize
    hooks = ModelHooks(**model_hooks(), take_weights=take_weights)
    if flags.evaluate:
        evaluate_only(context, data, model, hooks=hooks, max_batches=max_batches)
    else:
        if flags.pretrained and flags.deconv and not flags.resume:
            calibrate_weights(context, data[1], model, hooks)
        if flags.init and not flags.resume:
            start_from(context, model, data[1], hooks, partial(build_network, spec=data[0]))
        fit(context, data, model, hooks=hooks, max_batches=max_batches)


def build_script() -> Script:
    """Return the command line of this script and its rules."""
    description = "Train on ImageNet, with BatchNorm or with deconvolution."
    parser = Parser("main_imagenet.py", description, flags.IMAGENET_EXAMPLES)
    names = IMAGENET_ARCHITECTURES
    add = flags.add_network_flags(parser, names, describe_imagenet_architectures, "resnet18", None)
    text = f"""start from the pretrained weights of torchvision or timm, for any number of classes;
        with --deconv True, calibrate them on the first {CALIBRATION_BATCHES} training batches"""
    add("--pretrained", text, str2bool, False)
    flags.add_deconv_flags(parser, final_block=32)
    flags.add_imagenet_flags(parser)
    flags.add_training_flags(parser, {}, epochs=90, batch_size=256, weight_decay=1e-4)
    flags.add_device_flags(parser)
    flags.add_output_flags(parser)
    flags.add_advanced_flags(parser)
    return Script(parser, names, final_block=32, rules=own_rules)


def own_rules(flags: Namespace) -> Rules:
    """Yield each flag of this script only, whether its value is allowed, and the error."""
    for name in ("on_bad_image", "max_image_pixels", "val_split"):
        yield name, not flags.dummy, "does nothing with --dummy, which has no images"
    yield "data", not flags.dummy, "contradicts --dummy, which needs no images"
    yield "test_iter", flags.test_run, "needs --test-run True"
    known = flags.resume or flags.pretrained or not flags.evaluate
    yield "evaluate", known, "needs --resume RUN or --pretrained"
    is_published = "pretrained" in IMAGENET_ARCHITECTURES[flags.arch].options
    reason = f"does not apply to {flags.arch}: there are no weights for it"
    yield "pretrained", is_published or not flags.pretrained, reason
    reason = "contradicts --init, whose weights take the place; leave one of them out"
    yield "pretrained", not (flags.init and flags.pretrained), reason
    reason = "contradicts --pretrained, whose weights expect inputs that are not normalized"
    yield "norm_type", flags.norm_type == "none" or not flags.pretrained, reason
    calibrated = flags.pretrained and flags.deconv
    reason = "contradicts --pretrained, whose calibration needs the bias of each deconvolution"
    yield "bias", flags.bias or not calibrated, reason
    twin = f"{flags.arch.removesuffix('_bn')}d"
    twin = twin if twin in IMAGENET_ARCHITECTURES else "one of `--arch help` that ends in d"
    has_own_layers = is_published and not flags.deconv
    fault = f"does not apply to {flags.arch}, which has layers of its own; choose {twin}"
    reason = f"without --deconv True {fault}"
    yield "batchnorm", flags.batchnorm or not has_own_layers, reason
    yield "num_groups_final", not (flags.num_groups_final and has_own_layers), reason


def load_images(context: RunContext) -> tuple[DataSpec, ImageLoader | None, ImageLoader]:
    """Return the description of the dataset, the training loader and the test loader."""
    flags, options = context.flags, context.loader_options()
    if flags.dummy:
        return build_dummy_loaders(options)
    if flags.data is None:
        raise RunError("DIR is missing: the folder that holds train/ and val/, or --dummy")
    if context.saved and flags.evaluate:
        spec = DataSpec(**context.saved["spec"])
        return spec, None, build_test_loader(spec, flags.data, options)
    return build_imagenet_loaders(flags.data, options, test_only=flags.evaluate)


def build_network(flags: Namespace, spec: DataSpec) -> nn.Module:
    """Build the model that the flags describe."""
    try:
        model = build_imagenet_model(
            flags.arch,
            make_layers(**choose_layers(flags)),
            num_classes=spec.num_classes,
            image_size=spec.image_size,
            pretrained=flags.pretrained,
            download=not (flags.pretrained and flags.resume),
            dropout_rate=flags.dropout_rate,
        )
    except ValueError as error:  # an image size or number of classes that the model cannot have
        raise RunError(f"--arch {flags.arch}: {error}") from error
    except OSError as error:
        raise RunError(f"--pretrained: the weights cannot be downloaded: {error}") from error
    if flags.pretrained and not flags.resume:
        announce_head(flags, spec)
    return model


def announce_head(flags: Namespace, spec: DataSpec) -> None:
    """Print a line if the pretrained network gets a new last layer; refuse to test it."""
    classes = count_pretrained_classes(flags.arch)
    if classes == spec.num_classes:
        return
    if flags.evaluate:
        raise RunError(
            f"-e --pretrained: the weights have {classes} classes, the images {spec.num_classes}; "
            "train without -e first"
        )
    print_line(
        f"pretrained weights kept except for the last layer, which is new: "
        f"{spec.num_classes} classes instead of {classes}"
    )


if __name__ == "__main__":
    main()
