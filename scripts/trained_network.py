"""Rebuild the network of a checkpoint, and read images to test it with."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main as small_images
import main_imagenet as large_images
from util.checkpoint.store import load_checkpoint, load_newest
from util.cli.inherited import OF_THIS_MACHINE, check_config
from util.cli.parser import Parser, bounded_int, str2bool
from util.data.datasets import DATASETS, build_loaders, is_embedded
from util.data.imagenet import build_dummy_loaders
from util.data.images import DataSpec
from util.data.known_classes import build_test_loader
from util.data.loader import LoaderOptions
from util.errors import DataError
from util.training.resume import restore_model

LEAST_IMAGES = 4


@dataclass(frozen=True)
class TrainedNetwork:
    """Network of a checkpoint, in evaluation."""

    network: nn.Module  # with the checkpoint's weights, on the CPU
    flags: Namespace  # of the run, without those of the machine that trained
    spec: DataSpec  # of the training images
    saved: dict[str, Any]  # content of the checkpoint


def load_network(place: str, *, use_ema: bool | None = None) -> TrainedNetwork:
    """Rebuild the network of a checkpoint.

    Args:
        place: a checkpoint file, or a run's folder, which stands for its newest checkpoint.
        use_ema: choose the moving average of --ema (True) or the trained weights (False). None: the
            average if there is one.

    Raises:
        CheckpointError: `place` has no readable checkpoint, or the network does not fit it.

    Example:
        >>> trained = load_network("runs/digits/checkpoint.pth.tar")  # doctest: +SKIP
        >>> scores = trained.network(read_images(trained, None, 8))  # doctest: +SKIP
    """
    file, saved = _read_checkpoint(place)
    spec = DataSpec(**saved["spec"])
    network, flags = build_network(saved["config"], spec, file)
    restore_model(saved, network, file=file, spec=spec, use_ema=use_ema)
    return TrainedNetwork(network.eval(), flags, spec, saved)


def build_network(config: dict[str, Any], spec: DataSpec, file: str) -> tuple[nn.Module, Namespace]:
    """Return a new network and all flags for `config`, the flags that `file` has recorded.

    Raises:
        CheckpointError: names the first flag that could not have been typed.
    """
    script = small_images if "dataset" in config else large_images
    built = script.build_script()
    check_config(built, config, file)
    config = {name: value for name, value in config.items() if name not in OF_THIS_MACHINE}
    flags = Namespace(**{**built.parser.defaults(), **config, "resume": file})
    return script.build_network(flags, spec), flags


def read_images(trained: TrainedNetwork, data: str | None, count: int) -> Tensor:
    """Return the first test images (N, C, H, W), normalized as the network expects them.

    A smaller dataset gives all of its images.

    Raises:
        DataError: the folder `data` has no images of the run's dataset, or foreign classes.
        ValueError: no folder is named, or it has fewer than 4 images.
    """
    name, flags = trained.spec.name, trained.flags
    if data is not None and (is_embedded(name) or name == "dummy"):
        raise ValueError(f"--data {data} does not apply to {name}, which needs no folder")
    data = flags.data if data is None else data
    limits = {"image_size": flags.image_size, "max_image_pixels": flags.max_image_pixels}
    options = LoaderOptions(batch_size=count, **limits)
    try:
        if name == "dummy":
            *_, loader = build_dummy_loaders(options, test_size=count)
        elif name in DATASETS and name != "folder":
            *_, loader = build_loaders(name, data, options, cache_dir="")
        elif data is None:
            raise ValueError("name the folder of images with --data DIR")
        else:
            loader = build_test_loader(trained.spec, data, options)
    except DataError as error:
        raise DataError(f"--data {data}: {error}") from error
    images = torch.cat(list(islice((batch for batch, _ in loader), count)))[:count]
    if len(images) < LEAST_IMAGES:
        raise ValueError(f"at least {LEAST_IMAGES} images are needed, {data} has {len(images)}")
    return images


def make_parser(script: str, description: str, out: str, images: int, purpose: str) -> Parser:
    """Return a parser of CHECKPOINT, OUT, --data, --images; `out` and `purpose` are help texts."""
    parser = Parser(script, description)
    add = parser.add_group("files and images")
    text = "checkpoint of main.py or main_imagenet.py, or the folder of a run"
    add("checkpoint", text, str, metavar="CHECKPOINT")
    add("out", out, Path, metavar="OUT")
    add(
        "--data",
        "folder of the images",
        str,
        default_text="./data; ImageNet: required",
        metavar="DIR",
    )
    text = f"{purpose}, at least {LEAST_IMAGES}"
    add("--images --pictures", text, bounded_int(LEAST_IMAGES), images)
    text = "use the moving average of a run with --ema; False: its trained weights"
    add("--use-ema", text, str2bool, default_text="True if there is an average")
    return parser


def _read_checkpoint(place: str) -> tuple[str, dict[str, Any]]:
    """Return the checkpoint's path and content; warn about newer ones that are damaged."""
    if not os.path.isdir(place):
        return place, load_checkpoint(place)
    path, saved, faults = load_newest(place, load_checkpoint)
    for fault in faults:
        print(f"warning: {fault}; using {path}", file=sys.stderr)
    return str(path), saved
