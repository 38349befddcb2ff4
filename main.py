"""Train an image classifier, with BatchNorm or with deconvolution: `python main.py --help`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from deconv import batch_share, fuse, whiteness
from models import ARCHITECTURES, build_model, describe_architectures, make_layers
from util.cli import flags
from util.cli.launch import start
from util.cli.parser import Parser
from util.cli.script import PRESETS, Rules, Script
from util.cli.settings import choose_layers
from util.data.datasets import DATASETS, build_loaders, is_downloaded, is_embedded
from util.data.images import DataSpec
from util.data.loader import ImageLoader
from util.random_state import seed_everything
from util.training.hooks import ModelHooks
from util.training.session import RunContext, describe_kind, fit, test


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says. Exit: 2 bad input, 1 diverged, 128 + signal."""
    start(__file__, build_script(), train, argv)


def train(context: RunContext) -> None:
    """Flags -> data -> layers -> model -> epochs; with -e -> one test."""
    flags = context.flags
    run_dir = None if flags.evaluate else context.find_run_dir()
    spec, train_loader, test_loader = context.world.rank0_first(partial(load_images, context))
    seed_everything(flags.seed)
    model = build_network(flags, spec)
    hooks = ModelHooks(batch_share, fuse, judge_layers)
    if flags.evaluate:
        test(context, spec, model, test_loader, hooks=hooks)
        return
    kind = describe_kind(flags) if flags.method is None else f"method{flags.method}"
    name = f"{flags.dataset}-{flags.arch}-{kind}"
    fit(context, run_dir, name, kind, spec, model, train_loader, test_loader, hooks=hooks)


def judge_layers(network: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the whiteness of each layer's input, before and after whitening."""
    return whiteness(network, images).scalars()


def build_script() -> Script:
    """The command line of this script, and what is allowed on it."""
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
    options = {name: architecture.options for name, architecture in ARCHITECTURES.items()}
    return Script(parser, options, rules=data_rules)


def data_rules(flags: Namespace) -> Rules:
    """Yield each flag about the images, whether its value is allowed, and the error if not."""
    name = flags.dataset
    yield "data", not is_embedded(name), f"does not apply to {name}, which is embedded"
    yield "data_url", is_downloaded(name), f"does not apply to {name}, which is not downloaded"
    yield "on_bad_image", flags.dataset == "folder", "needs --dataset folder"
    yield "evaluate", flags.resume or not flags.evaluate, "needs --resume FILE: which network?"


def load_images(context: RunContext) -> tuple[DataSpec, ImageLoader, ImageLoader]:
    flags, world = context.flags, context.world
    return build_loaders(
        flags.dataset,
        flags.data,
        batch_size=flags.batch_size,
        num_workers=world.workers_per_process(flags.num_workers),
        seed=flags.seed,
        image_size=flags.image_size,
        cache_dir=Path(flags.out).expanduser(),
        device_type=context.device.type,
        on_bad_image=flags.on_bad_image,
        mirror=flags.data_url,
        rank=world.rank,
        processes=world.size,
    )


def build_network(flags: Namespace, spec: DataSpec) -> nn.Module:
    """Layers as the flags want them, and the network made of them."""
    return build_model(
        flags.arch,
        make_layers(**choose_layers(flags)),
        in_channels=spec.in_channels,
        num_classes=spec.num_classes,
        image_size=spec.image_size,
        method=flags.method,
        dropout_rate=flags.dropout_rate,
    )


if __name__ == "__main__":
    main()
