"""The flags, in groups: names, meanings, ranges and defaults."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection
from typing import Any

from util.cli.parser import (
    Parser,
    bounded_float,
    bounded_int,
    mirror_url,
    path_name,
    rendezvous_url,
    str2bool,
)
from util.data.loader import MIN_IMAGE_SIZE
from util.training.accelerator import PRECISIONS
from util.training.optim import LOSSES, OPTIMIZERS, SCHEDULES

HUGE = 1e36  # what PyTorch takes beside float32, whose numbers end at 3e38, and a factor of ten
MIRROR_VARIABLE = "DECONV_DATA_URL"
YES = {"action": "store_true", "default": False, "default_text": ""}  # a flag without a value


class _ArchAction(argparse.Action):
    """`--arch NAME`; `--arch help` prints what there is."""

    def __init__(
        self, *args: Any, names: Collection[str], describe: Callable[[], str], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.names, self.describe = names, describe

    def __call__(self, parser, namespace, value, option_string=None) -> None:
        if value == "help":
            print(self.describe().rstrip("\n"))
            parser.exit(0)
        if value not in self.names:
            known = ", ".join(self.names)
            parser.error(f"argument --arch: {value!r} is unknown; choose from {known}")
        setattr(namespace, self.dest, value)


def add_network_flags(
    parser: Parser,
    architectures: Collection[str],
    describe: Callable[[], str],
    default: str,
    dropout_rate: float | None = 0.0,
) -> Callable[..., None]:
    """The flags about networks that all scripts have; returns what adds further ones.

    Args:
        default: architecture.
        dropout_rate: default; None: as the architecture was published.
    """
    arch = {"action": _ArchAction, "names": architectures, "describe": describe, "metavar": "NAME"}
    add = parser.add_group("network")
    add("-a --arch", "architecture; `--arch help` lists them", None, default, **arch)
    add("--batchnorm", "BatchNorm", str2bool, default_text="True, or False with --deconv True")
    add("--bias", "bias in convolutions", str2bool, default_text="True, or False with BatchNorm")
    dropout = {"default_text": "as published" if dropout_rate is None else None, "metavar": "P"}
    text = "dropout before the last layer"
    add("--dropout-rate", text, bounded_float(minimum=0, below=1), dropout_rate, **dropout)
    return add


def add_method_flag(add: Callable[..., None]) -> None:
    add(
        "--method",
        "layers of simple_v1 and mlp: 1 plain, 2 channel deconvolution, 3 joint deconvolution, 4 "
        "deconvolution in blocks of 32",
        bounded_int(1, 4),
        default_text="1, or 3 with --deconv True",
        metavar="1..4",
    )


def add_deconv_flags(parser: Parser, final_block: int) -> None:
    add = parser.add_group("deconvolution")
    add("--deconv", "deconvolution in place of BatchNorm", str2bool, False)
    add(
        "--mode",
        "what is whitened: 1 channels, then pixels; 2 pixels; 3 channels; 4 both jointly, over "
        "every patch; 5 both jointly, over sampled patches",
        bounded_int(1, 5),
        5,
        metavar="1..5",
    )
    add("--num-groups --block", "channels whitened together", bounded_int(1), 16, metavar="B")
    add(
        "--num-groups-final --block-fc",
        "features whitened together before the last linear layer, 0: it is not whitened",
        bounded_int(0),
        default_text=f"{final_block}, or 0 without --deconv True",
        metavar="B",
    )
    steps = bounded_int(1, 15)  # more would lose accuracy in float32
    add(
        "--deconv-iter",
        "Newton-Schulz steps to the inverse root, or whose floor it has, up to 15",
        steps,
        5,
        metavar="N",
    )
    add("--stem-iter", "in the first layer", steps, default_text="as --deconv-iter", metavar="N")
    add(
        "--eps",
        "regularisation of the covariance, in units of variance",
        bounded_float(minimum=1e-12, below=HUGE),
        1e-2,
        metavar="E",
    )
    add(
        "--stride",
        "sampled patches lie N strides of the convolution apart",
        bounded_int(1),
        3,
        metavar="N",
    )
    add(
        "--rows-per-feature",
        "modes 1, 2 and 5: look at so few patches, spread over images and positions, that a "
        "batch has N rows (of each block one) for each feature of a matrix; 0: at all that "
        "--stride leaves",
        bounded_float(minimum=0),
        24,
        metavar="N",
    )
    text = (
        "inverse root of the covariance: Newton-Schulz steps, as published; resolvents, the same "
        "within 0.75 % for a small part of the price; the Cholesky factor, not symmetric"
    )
    add("--root", text, None, "cholesky", choices=("newton", "resolvent", "cholesky"))
    text = "blocks of neighbouring channels, or channels dealt to them in turn"
    add("--layout", text, None, "interleaved", choices=("contiguous", "interleaved"))
    add(
        "--share-blocks",
        "the blocks of a layer share one whitening matrix",
        str2bool,
        True,
    )


def add_data_flags(parser: Parser, datasets: Collection[str]) -> None:
    """The images of main.py."""
    add = parser.add_group("data")
    add("--dataset", "the images", None, "cifar10", choices=datasets)
    add(
        "--data",
        "where data sets lie or are downloaded to; for `--dataset folder` the folder that holds "
        "train/CLASS/* and test/CLASS/* (or val/CLASS/*); embedded datasets take none",
        path_name,
        "./data",
        metavar="DIR",
    )
    add(
        "--data-url",
        "the address of a folder that holds the archives of the data set by their published names, "
        "to download them from there; checksums are compared all the same",
        mirror_url,
        os.environ.get(MIRROR_VARIABLE) or None,
        default_text=f"${MIRROR_VARIABLE}, or the published address",
        metavar="URL",
    )
    add(
        "--image-size",
        "side that images are brought to, in pixels",
        bounded_int(MIN_IMAGE_SIZE, 4096),
        MIN_IMAGE_SIZE,
        metavar="N",
    )
    add_reading_flags(add, 0)
    add(
        "-e --evaluate",
        "only test the network of --resume; all about training is left aside",
        **YES,
    )


def add_imagenet_flags(parser: Parser) -> None:
    """The images of main_imagenet.py, and what is done with them."""
    add = parser.add_group("data")
    text = "the folder that holds train/CLASS/* and val/CLASS/* (or test/CLASS/*)"
    add("data", text, path_name, nargs="?", metavar="DIR")
    add("--dummy", "noise in place of images, for timing without data", **YES)
    size = bounded_int(MIN_IMAGE_SIZE, 4096)
    add("--image-size", "side of the crops, in pixels", size, 224, metavar="N")
    add_reading_flags(add, os.cpu_count() or 1)
    text = "only test the network of --resume, or --pretrained; all about training is left aside"
    add("-e --evaluate", text, **YES)
    add("--test-run", "only some batches of each epoch, and of each test", str2bool, False)
    add("--test-iter", "of --test-run: so many", bounded_int(1), 500, metavar="N")


def add_reading_flags(add: Callable[..., None], workers: int) -> None:
    """How files of images are read; `workers` is a default."""
    text = "a image file that cannot be decoded ends the run, or is left out and listed"
    add("--on-bad-image", text, None, "error", choices=("error", "skip"))
    text = "processes that load images on this machine, 0: none but those that train"
    add("-j --num-workers --workers", text, bounded_int(0, 1024), workers, metavar="N")


def add_training_flags(
    parser: Parser, presets: Collection[str], *, epochs: int, batch_size: int, weight_decay: float
) -> None:
    """How a network is trained; the keywords are defaults."""
    add = parser.add_group("training")
    if presets:
        add(
            "--preset",
            "paper, for the paper's tables: --batch-size 128 --wd 1e-3 --num-groups 64 --eps 1e-5 "
            "--deconv-iter 5 --stem-iter 15 --root resolvent --rows-per-feature 0; flags typed "
            "beside it win",
            choices=presets,
        )
    add("--epochs", "epochs in all", bounded_int(1), epochs, metavar="N")
    add(
        "--start-epoch",
        "count and schedule as if N epochs were done",
        bounded_int(0),
        0,
        metavar="N",
    )
    add(
        "--max-steps",
        "stop after N optimizer steps in all; the schedule spans them",
        bounded_int(1),
        metavar="N",
    )
    text = "images per step, over all devices together"
    add("-b --batch-size", text, bounded_int(1, 10**6), batch_size, metavar="N")
    text = "cross-entropy, or half the squared distance to the one-hot target"
    add("--loss", text, None, "CE", choices=LOSSES)
    add("--optimizer", "update rule", None, "SGD", choices=OPTIMIZERS)
    rate = bounded_float(above=0, below=HUGE)
    add("--lr --learning-rate", "learning rate at the start", rate, 0.1, metavar="LR")
    add("--momentum", "of SGD", bounded_float(minimum=0, below=1), 0.9, metavar="M")
    decay = {"metavar": "W", "dest": "weight_decay"}
    add(
        "--wd --weight-decay",
        "weight decay",
        bounded_float(minimum=0, below=HUGE),
        weight_decay,
        **decay,
    )
    add(
        "--lr-scheduler",
        "cosine falls to 0 step by step over the run, multistep drops at the milestones, step "
        "every so many epochs",
        None,
        "cosine",
        choices=SCHEDULES,
    )
    add(
        "--milestone",
        "of multistep: epochs (60 80) or fractions of the run (.5 .75); a single fraction repeats, "
        "0.4 again at 0.8",
        bounded_float(minimum=1e-3),
        [0.4],
        default_text=0.4,
        nargs="+",
        metavar="M",
    )
    add(
        "--multistep-gamma", "factor at a drop", bounded_float(above=0, maximum=1), 0.1, metavar="G"
    )
    add("--scheduler-step-size", "of step: epochs between drops", bounded_int(1), 30, metavar="N")
    add(
        "--warmup-epochs",
        "epochs, or a part of one, in which the learning rate climbs to --lr",
        bounded_float(minimum=0),
        0.0,
        metavar="N",
    )
    add("--seed", "same seed, same result", bounded_int(0, 2**62), 0, metavar="N")


def add_device_flags(parser: Parser) -> None:
    """What computes, and how."""
    add = parser.add_group("devices")
    add(
        "--use-gpu",
        "train on GPUs: all that are visible",
        str2bool,
        default_text="if there are any",
    )
    add("--gpu", "only on the GPU of this number", bounded_int(0, 1023), metavar="N")
    add(
        "--threads",
        "CPU threads of PyTorch",
        bounded_int(1, 1024),
        default_text="as PyTorch chooses",
        metavar="N",
    )
    text = "mixed precision; whitening stays in float32"
    add("--amp", text, None, "off", choices=tuple(PRECISIONS))
    alone = {"nargs": "?", "const": True}  # the flag without a value means True
    text = "images in memory pixel by pixel, faster on some devices"
    add("--channels-last", text, str2bool, False, **alone)
    add("--compile", "translate the network with torch.compile", str2bool, False, **alone)
    add(
        "--cuda-graphs",
        "record the kernels of a training step once and replay them, so that a GPU need not wait "
        "for each",
        str2bool,
        default_text="on one GPU, unless --compile is given",
    )
    text = "only operations that give the same bits each time, on GPUs too; slower"
    add("--deterministic", text, str2bool, False, **alone)
    add(
        "--sync-stats",
        "whiten by the statistics of the whole batch; False: each device by those of its share",
        str2bool,
        True,
    )
    add("--multiprocessing-distributed", "one process for each GPU, as is the default", **YES)
    machines = "machines that train together, see also torchrun"
    add("--world-size", machines, bounded_int(1, 10**5), default_text=1, metavar="N")
    add("--rank", "number of this machine, from 0", bounded_int(0, 10**5), metavar="N")
    text = "where machines meet: tcp://HOST:PORT of the first, or env:// for MASTER_ADDR and _PORT"
    add("--dist-url", text, rendezvous_url, metavar="URL")
    text = "how processes talk"
    add("--dist-backend", text, default_text="nccl on GPUs, else gloo", choices=("nccl", "gloo"))


def add_output_flags(parser: Parser) -> None:
    add = parser.add_group("output")
    add(
        "--out",
        "runs go to DIR/<dataset>-<arch>-<kind>/<time>/, cached statistics of data sets to DIR",
        path_name,
        default_text="./runs, or the parent of the run's folder",
        metavar="DIR",
    )
    add("--run-dir", "the run goes exactly here instead", path_name, metavar="DIR")
    add(
        "--resume",
        "continue from a checkpoint, or the last one of a run's folder, to --epochs in all, in its "
        "folder unless --run-dir is given; auto: from that of --run-dir, if there is one yet. "
        "Flags left out are the checkpoint's, but for places and those about GPUs and machines; "
        "--max-steps goes when --epochs is typed. With more epochs than before the schedule is "
        "that of the new total, so the rate rises to its curve",
        path_name,
        metavar="FILE",
    )
    add(
        "--checkpoint-epoch",
        "also keep checkpoint_<epoch>.pth.tar every N epochs, 0: never",
        bounded_int(0),
        0,
        metavar="N",
    )
    text = "save the checkpoint every N optimizer steps as well, 0: after each epoch only"
    add("--checkpoint-steps", text, bounded_int(0), 0, metavar="N")
    text = "steps between two rows of train_batch.log, points in TensorBoard, lines without a bar"
    add("-p --print-freq", text, bounded_int(1), 10, metavar="N")
    add("--msg", "print a line per batch", str2bool, False)
    add("--save-plot", "draw TrainingPlots.png", str2bool, True)
    add("--tensorboardX --tensorboard", "write TensorBoard events", str2bool, True)
