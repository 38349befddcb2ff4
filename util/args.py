"""The flags, in groups: names, meanings, ranges and defaults."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection
from typing import Any

from .data import SMALLEST
from .optim import LOSSES, OPTIMIZERS, SCHEDULES
from .parser import Parser, real, str2bool, whole


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
    parser: Parser, architectures: Collection[str], describe: Callable[[], str]
) -> None:
    arch = {"action": _ArchAction, "names": architectures, "describe": describe, "metavar": "NAME"}
    add = parser.add_group("network")
    add("-a --arch", "architecture; `--arch help` lists them", None, "vgg11", **arch)
    add(
        "--method",
        "layers of simple_v1 and mlp: 1 plain, 2 channel deconvolution, 3 joint deconvolution, 4 "
        "deconvolution in blocks of 32",
        whole(1, 4),
        shown="1, or 3 with --deconv True",
        metavar="1..4",
    )
    add("--batchnorm", "BatchNorm", str2bool, shown="True, or False with --deconv True")
    add("--bias", "bias in convolutions", str2bool, shown="True, or False with BatchNorm")
    add("--dropout-rate", "dropout before the last layer", real(least=0, below=1), 0.0, metavar="P")


def add_deconv_flags(parser: Parser) -> None:
    add = parser.add_group("deconvolution")
    add("--deconv", "deconvolution in place of BatchNorm", str2bool, False)
    add(
        "--mode",
        "what is whitened: 1 channels, then pixels; 2 pixels; 3 channels; 4 both jointly, over "
        "every patch; 5 both jointly, over sampled patches",
        whole(1, 5),
        5,
        metavar="1..5",
    )
    add("--num-groups --block", "channels whitened together", whole(1), 16, metavar="B")
    add(
        "--num-groups-final --block-fc",
        "features whitened together before the last linear layer, 0: it is not whitened",
        whole(0),
        shown="512, or 0 without --deconv True",
        metavar="B",
    )
    steps = whole(1, 15)  # more would lose accuracy in float32
    add("--deconv-iter", "Newton-Schulz steps to the inverse root, up to 15", steps, 5, metavar="N")
    add("--stem-iter", "in the first layer", steps, shown="as --deconv-iter", metavar="N")
    add(
        "--eps",
        "regularisation of the covariance, in units of variance",
        real(least=1e-12),
        1e-2,
        metavar="E",
    )
    add(
        "--stride",
        "sampled patches lie N strides of the convolution apart",
        whole(1),
        3,
        metavar="N",
    )
    layouts = {"choices": ("contiguous", "interleaved"), "shown": "as the layer has it"}
    add("--layout", "blocks of neighbouring channels, or channels dealt to them in turn", **layouts)
    add(
        "--share-blocks",
        "the blocks of a layer share one whitening matrix",
        str2bool,
        shown="as the layer has it",
    )


def add_data_flags(parser: Parser, datasets: Collection[str]) -> None:
    add = parser.add_group("data")
    add("--dataset", "the pictures", None, "cifar10", choices=datasets)
    add(
        "--data",
        "where data sets lie or are downloaded to; for `--dataset folder` the folder that holds "
        "train/CLASS/* and test/CLASS/* (or val/CLASS/*); digits takes none",
        None,
        "./data",
        metavar="DIR",
    )
    add(
        "--image-size",
        "side that pictures are brought to, in pixels",
        whole(SMALLEST, 4096),
        shown=SMALLEST,
        metavar="N",
    )
    add(
        "-j --num-workers",
        "processes that load pictures, 0: none but this",
        whole(0, 1024),
        0,
        metavar="N",
    )


def add_training_flags(parser: Parser, presets: Collection[str]) -> None:
    add = parser.add_group("training")
    add(
        "--preset",
        "paper, for the paper's tables: --batch-size 128 --wd 1e-3 --num-groups 64 --eps 1e-5 "
        "--deconv-iter 5 --stem-iter 15; flags typed beside it win",
        choices=presets,
    )
    add("--epochs", "epochs in all", whole(1), 100, metavar="N")
    add(
        "--max-steps",
        "stop after N optimizer steps in all; the schedule spans them",
        whole(1),
        metavar="N",
    )
    add("-b --batch-size", "pictures per step", whole(1, 10**6), 512, metavar="N")
    add("--loss", "cross-entropy or squared error", None, "CE", choices=LOSSES)
    add("--optimizer", "update rule", None, "SGD", choices=OPTIMIZERS)
    add("--lr", "learning rate at the start", real(above=0), 0.1, metavar="LR")
    add("--momentum", "of SGD", real(least=0, below=1), 0.9, metavar="M")
    add(
        "--wd --weight-decay", "weight decay", real(least=0), 5e-4, metavar="W", dest="weight_decay"
    )
    add(
        "--lr-scheduler",
        "cosine falls to 0 step by step over the run, multistep drops at the milestones",
        None,
        "cosine",
        choices=SCHEDULES,
    )
    add(
        "--milestone",
        "of multistep: epochs (60 80) or fractions of the run (.5 .75); a single fraction repeats, "
        "0.4 again at 0.8",
        real(least=1e-3),
        [0.4],
        shown=0.4,
        nargs="+",
        metavar="M",
    )
    add("--multistep-gamma", "factor at a milestone", real(above=0), 0.1, metavar="G")
    add("--seed", "same seed, same result", whole(0, 2**63 - 1), 0, metavar="N")
    add("--use-gpu", "train on the GPU", str2bool, shown="if there is one")
    add(
        "--threads",
        "CPU threads of PyTorch",
        whole(1, 1024),
        shown="as PyTorch chooses",
        metavar="N",
    )


def add_output_flags(parser: Parser) -> None:
    add = parser.add_group("output")
    add(
        "--out",
        "runs go to DIR/<dataset>-<arch>-<kind>/<time>/, cached statistics of data sets to DIR",
        shown="./runs, or the parent of --run-dir",
        metavar="DIR",
    )
    add("--run-dir", "the run goes exactly here instead", metavar="DIR")
    add(
        "--resume",
        "continue from a checkpoint to --epochs in all, in its folder unless --run-dir is given. "
        "Flags left out are the checkpoint's, but --max-steps goes when --epochs is typed. With "
        "more epochs than before the schedule is that of the new total, so the rate rises to its "
        "curve",
        os.path.expanduser,
        metavar="FILE",
    )
    add(
        "--checkpoint-epoch",
        "also keep checkpoint_<epoch>.pth.tar every N epochs, 0: never",
        whole(0),
        0,
        metavar="N",
    )
    add("--print-freq", "batches between two rows of train_batch.log", whole(1), 10, metavar="N")
    add("--msg", "print a line per batch", str2bool, False)
    add("--save-plot", "draw TrainingPlots.png", str2bool, True)
    add("--tensorboardX --tensorboard", "write TensorBoard events", str2bool, True)
