"""Flags of main.py and main_imagenet.py by group: names, help, ranges and defaults."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

from util.cli.parser import (
    Parser,
    bounded_float,
    bounded_int,
    mirror_url,
    path_name,
    rendezvous_url,
    str2bool,
)
from util.data import AUTO_AUGMENT, MAX_IMAGE_PIXELS, MIN_IMAGE_SIZE
from util.training.accelerator import PRECISIONS
from util.training.optim import DECOUPLED, LOSSES, OPTIMIZERS, SCHEDULES

FLOAT32_LIMIT = 1e36  # float32 ends at 3e38; a factor of 100 remains for products
MIRROR_VARIABLE = "DECONV_DATA_URL"
MAX_NEWTON_STEPS = 15  # more lose accuracy in float32

EXAMPLES = """examples:
  train:             python main.py --arch vgg11 --dataset cifar10 -b 128 --epochs 20 --deconv
  with BatchNorm:    python main.py --arch vgg11 --dataset cifar10 -b 128 --epochs 20 --lr 0.01
  resume a run:      python main.py --resume runs/cifar10-vgg11-deconv-mode5/TIME --epochs 40
  on two GPUs:       CUDA_VISIBLE_DEVICES=0,1 python main.py --arch resnet50 --deconv
"""
IMAGENET_EXAMPLES = """examples:
  train:             python main_imagenet.py -a resnet18d -j 32 --deconv DIR
  with BatchNorm:    python main_imagenet.py -a resnet18 -j 32 DIR
  resume a run:      python main_imagenet.py --resume runs/imagenet-resnet18d-deconv-mode5/TIME DIR
  evaluate on a GPU: python main_imagenet.py -e --gpu 0 -a resnet50 --pretrained DIR
"""


def add_network_flags(
    parser: Parser,
    architectures: Collection[str],
    describe: Callable[[], str],
    default: str,
    dropout_rate: float | None = 0.0,
) -> Callable[..., None]:
    """Add the flags of the network; return the function that adds more of them.

    Args:
        parser: the parser to extend.
        architectures: names of all architectures.
        describe: returns the text of `--arch help`.
        default: name of an architecture.
        dropout_rate: default; None means the rate of the published architecture.
    """

    def architecture(name: str) -> str:
        if name == "help":
            with suppress(OSError):  # such as a closed pipe
                print(describe().rstrip("\n"), flush=True)
            parser.exit()
        if name not in architectures:
            known = ", ".join(architectures)
            raise argparse.ArgumentTypeError(f"{name!r} is unknown; choose from {known}")
        return name

    add = parser.add_group("network")
    text = "architecture; `--arch help` lists them"
    add("-a --arch", text, architecture, default, complete=architectures, metavar="NAME")
    text = "normalize activations with BatchNorm"
    add("--batchnorm", text, str2bool, default_text="True, or False with --deconv")
    text = "give convolutions a bias"
    add("--bias", text, str2bool, default_text="True, or False with BatchNorm")
    text = "dropout probability before the last linear layer, below 1"
    rate = bounded_float(minimum=0, below=1)
    published = "as published" if dropout_rate is None else None
    add("--dropout-rate", text, rate, dropout_rate, published, metavar="P")
    return add


def add_method_flag(add: Callable[..., None]) -> None:
    """Add the flag of the fully connected networks."""
    text = """layers of simple_v1 and mlp: 1 plain; 2 whiten channels; 3 whiten all features
        jointly; 4 whiten features in blocks of 32"""
    add("--method", text, bounded_int(1, 4), None, "1, or 3 with --deconv", metavar="1..4")


def add_deconv_flags(parser: Parser, final_block: int) -> None:
    """Add the flags of the method; `final_block` is the default of --num-groups-final."""
    add = parser.add_group(
        "deconvolution",
        "A deconvolution layer decorrelates the patches that a convolution sees:\n"
        "it multiplies them by the inverse square root of their covariance.",
    )
    add("--deconv", "replace BatchNorm with deconvolution", str2bool, False)
    text = """correlations to remove: 1 between channels, then between pixels; 2 between pixels; 3
        between channels; 4 between channels and pixels jointly; 5 as 4, with the covariance
        estimated from a sample of the patches"""
    add("--mode", text, bounded_int(1, 5), 5, metavar="1..5")
    text = """channels per block; only channels of the same block are decorrelated from each other,
        and larger blocks cost more time"""
    add("--num-groups --block", text, bounded_int(1), 16, metavar="B")
    text = """features per block at the input of the last linear layer; 0 does not whiten this
        input"""
    default = f"{final_block}, or 0 without --deconv"
    add("--num-groups-final --block-fc", text, bounded_int(0), None, default, metavar="B")
    text = """Newton-Schulz iterations for the inverse square root of the covariance, up to 15; more
        iterations whiten directions of lower variance. The other choices of --root approximate
        the result of this number of iterations"""
    add("--deconv-iter", text, bounded_int(1, MAX_NEWTON_STEPS), 5)
    text = "regularization: added to the diagonal of the covariance, in units of variance"
    bounds = bounded_float(minimum=1e-12, below=FLOAT32_LIMIT)
    add("--eps", text, bounds, 1e-2, metavar="E")
    text = "modes 1, 2, 3 and 5: estimate the covariance from every N-th patch in each direction"
    add("--stride", text, bounded_int(1), 3)


def add_data_flags(parser: Parser, datasets: Collection[str]) -> None:
    """Add the flags of main.py about images."""
    add = parser.add_group("data")
    add("--dataset", "dataset to train and test on", None, "cifar10", choices=datasets)
    text = """folder of the datasets, where missing ones are downloaded to; for `--dataset folder`
        the folder that holds train/CLASS/* and test/CLASS/* (or val/CLASS/*); embedded datasets
        need no folder"""
    add("--data", text, path_name, "./data", metavar="DIR")
    text = """folder to download from, which holds the archives under their published names;
        checksums are still verified"""
    mirror = os.environ.get(MIRROR_VARIABLE) or None
    default = f"${MIRROR_VARIABLE}, or the published address"
    add("--data-url", text, mirror_url, mirror, default, metavar="URL")
    text = "cache the decoded images of --dataset folder in DIR, a local disk, for the next start"
    add("--cache-dir", text, path_name, default_text="decode at each start", metavar="DIR")
    text = "side of the images after resizing, in pixels"
    _add_image_flags(add, text, MIN_IMAGE_SIZE, workers=0, models="--resume")


def add_imagenet_flags(parser: Parser) -> None:
    """Add the flags of main_imagenet.py about images."""
    add = parser.add_group("data")
    text = "folder that holds train/CLASS/* and val/CLASS/* (or test/CLASS/*)"
    add("data", text, path_name, nargs="?", metavar="DIR")
    add("--dummy", "train on random noise, to time a step without data", str2bool, False)
    text, models = "side of the crops, in pixels", "--resume or --pretrained"
    _add_image_flags(add, text, 224, workers=os.cpu_count() or 1, models=models)
    add("--test-run", "shorten every epoch and every test to --test-iter batches", str2bool, False)
    add("--test-iter", "batches of a --test-run", bounded_int(1), 500)


def _add_image_flags(
    add: Callable[..., None], text: str, size: int, *, workers: int, models: str
) -> None:
    """Add the flags about image files, with the help and the default of --image-size."""
    add("--image-size", text, bounded_int(MIN_IMAGE_SIZE, 4096), size)
    text = "stop at an image file that cannot be decoded, or skip and list it"
    add("--on-bad-image", text, None, "error", choices=("error", "skip"))
    text = """hold out the fraction F of the training images of each class, drawn by --seed; they
        choose the best epoch, model_best.pth.tar, in place of the test images"""
    add("--val-split", text, bounded_float(minimum=0, below=1), 0.0, metavar="F")
    text = "refuse image files of more pixels; each pixel takes 3 bytes of memory"
    add("--max-image-pixels", text, bounded_int(1, 10**12), MAX_IMAGE_PIXELS)
    text = "processes that load images on this machine; 0 loads in the training processes"
    add("-j --num-workers --workers", text, bounded_int(0, 1024), workers)
    text = f"test the model of {models} and exit; flags about training are ignored"
    add("-e --evaluate", text, str2bool, False)
    text = """with -e, print the accuracy of each class, and write confusion_matrix.csv and
        confusion_matrix.png into the folder of the run"""
    add("--per-class", text, str2bool, False)


def add_training_flags(
    parser: Parser, presets: Mapping[str, str], *, epochs: int, batch_size: int, weight_decay: float
) -> None:
    """Add the flags of training; the keywords are defaults."""
    add = parser.add_group("training")
    text = """YAML file of flags, such as `batch-size: 128`, or the folder of a run, for the flags
        in its args.json; flags on the command line override them"""
    add("--config", text, path_name, metavar="FILE")
    if presets:  # main_imagenet.py has none
        text = f"paper: the settings of the paper's tables, {presets['paper']}"
        add("--preset", f"{text}; flags on the command line override them", choices=presets)
    add("--epochs", "total number of epochs", bounded_int(1), epochs)
    text = """stop after N optimizer steps in total; the learning rate schedule spans these N
        steps"""
    add("--max-steps", text, bounded_int(1))
    text = "images per optimizer step, over all devices together"
    add("-b --batch-size", text, bounded_int(1, 10**6), batch_size)
    text = """split each batch into N micro-batches, forwarded one after the other to save memory;
        the step takes their mean gradient. Each micro-batch has its own batch statistics, in
        BatchNorm and in deconvolution"""
    add("--accum-steps", text, bounded_int(1, 10**6), 1)
    text = "CE: cross-entropy; L2: half the squared distance to the one-hot target"
    add("--loss", text, None, "CE", choices=LOSSES)
    text = "share of each training target that --loss CE spreads evenly over all classes"
    share = bounded_float(minimum=0, below=1)
    add("--label-smoothing", text, share, 0.0, metavar="E")
    text = """optimizer; Muon updates the weights of convolutions and linear layers, and leaves
        classifier, biases and norms to AdamW at the same rate"""
    add("--optimizer", text, None, "SGD", choices=OPTIMIZERS)
    rate = bounded_float(above=0, below=FLOAT32_LIMIT)
    decoupled = "with AdamW and Muon"
    form = {"metavar": "LR", "default_text": f"0.1, or {DECOUPLED['lr']:g} {decoupled}"}
    add("--lr --learning-rate", "initial learning rate", rate, 0.1, **form)
    add("--momentum", "momentum of SGD", bounded_float(minimum=0, below=1), 0.9, metavar="M")
    bounds = bounded_float(minimum=0, below=FLOAT32_LIMIT)
    default = f"{weight_decay:g}, or {DECOUPLED['weight_decay']:g} {decoupled}"
    form = {"metavar": "W", "dest": "weight_decay", "default_text": default}
    text = "weight decay: decoupled with AdamW and Muon, else an L2 penalty"
    add("--wd --weight-decay", text, bounds, weight_decay, **form)
    text = "exempt biases and the scales of norms from weight decay"
    add("--no-decay-norm-bias", text, str2bool, False)
    text = "scale the gradients of a step down to NORM if their joint norm is larger"
    add("--clip-grad", text, bounded_float(above=0, below=FLOAT32_LIMIT), metavar="NORM")
    text = """keep an exponential moving average of weights and running statistics, over about
        1 / (1 - DECAY) steps. The average is tested after each epoch beside the trained weights,
        and its accuracy chooses model_best.pth.tar"""
    add("--ema", text, bounded_float(above=0, below=1), metavar="DECAY")
    text = "with -e, test the moving average of --ema; False tests the trained weights"
    add("--use-ema", text, str2bool, default_text="True if there is an average")
    text = """cosine and linear: decay to 0 over the run, step by step; multistep: multiply by
        --multistep-gamma at each --milestone; step: multiply by --multistep-gamma
        every --scheduler-step-size epochs"""
    add("--lr-scheduler", text, None, "cosine", choices=SCHEDULES)
    text = """milestones of multistep, in epochs (60 80) or as fractions of the run (0.5 0.75); a
        single fraction repeats: 0.4 also stands for 0.8"""
    add("--milestone", text, bounded_float(minimum=1e-3), [0.4], 0.4, nargs="+", metavar="M")
    text = "factor of the learning rate at a milestone"
    add("--multistep-gamma", text, bounded_float(above=0, maximum=1), 0.1, metavar="G")
    text = "epochs between two drops of --lr-scheduler step"
    add("--scheduler-step-size", text, bounded_int(1), 30)
    text = "epochs, or a fraction of one, over which the learning rate rises linearly to --lr"
    add("--warmup-epochs", text, bounded_float(minimum=0), 0.0)
    text = "random seed; on a CPU, runs with the same seed and flags agree bit for bit"
    add("--seed", text, bounded_int(0, 2**62), 0)

    text = "Applied to training images, in addition to the dataset's crop and flip."
    add = parser.add_group("augmentation", text)
    text = """random operations on the colour and geometry of each image. ra: RandAugment; ta_wide:
        TrivialAugment; augmix: AugMix; imagenet and cifar10: learned policies of AutoAugment"""
    add("--auto-augment", text, None, "off", choices=AUTO_AUGMENT)
    text = "erase a random rectangle of an image with probability P"
    add("--random-erase", text, bounded_float(minimum=0, maximum=1), 0.0, metavar="P")
    text = """mix each image and its target with another of the batch, in shares drawn from
        Beta(ALPHA, ALPHA); 0 turns this off. With --cutmix as well, each batch draws one of the
        two. Training accuracy counts the class of the larger share"""
    share = bounded_float(minimum=0, maximum=100)
    add("--mixup", text, share, 0.0, metavar="ALPHA")
    text = "paste a rectangle of another image into each image; shares as with --mixup, 0 is off"
    add("--cutmix", text, share, 0.0, metavar="ALPHA")


def add_device_flags(parser: Parser) -> None:
    """Add the flags of devices."""
    add = parser.add_group("device")
    add("--use-gpu", "train on all visible GPUs", str2bool, default_text="True if there is any")
    add("--gpu", "train on the GPU of this index only", bounded_int(0, 1023))
    text = "CPU threads of PyTorch per process"
    add("--threads", text, bounded_int(1, 1024), default_text="PyTorch's choice")
    text = "dtype of mixed precision training; statistics and whitening stay in float32"
    add("--amp", text, None, "off", choices=tuple(PRECISIONS))
    add("--compile", "compile the network with torch.compile", str2bool, False)


def add_output_flags(parser: Parser) -> None:
    """Add the flags of what a run writes and resumes."""
    add = parser.add_group("output")
    text = """write runs to DIR/<dataset>-<arch>-<kind>/<time>/ and cached dataset statistics to
        DIR"""
    default = "./runs, or as in the resumed run, or the parent of --run-dir"
    add("--out", text, path_name, None, default, metavar="DIR")
    add("--run-dir", "write the run to exactly this folder", path_name, metavar="DIR")
    text = """folder of a run to continue from its newest checkpoint, up to --epochs in total, or a
        checkpoint file; auto: the newest checkpoint in --run-dir, or a fresh start if there is
        none. Flags that are left out are taken from the checkpoint, except paths and flags about
        GPUs and machines. A run that --max-steps ended continues to the end of its epochs, or to
        a new --max-steps. More steps or epochs stretch the learning rate schedule"""
    add("--resume", text, path_name, metavar="RUN")
    text = """start a new run from the weights of an earlier run, a checkpoint or a state_dict.
        Layers of other names or shapes start anew and are listed. With --deconv True, BatchNorm is
        folded into the weights, and the first training batches calibrate them"""
    add("--init", text, path_name, metavar="RUN|FILE")
    text = "keep an extra checkpoint_<epoch>.pth.tar every N epochs; 0 keeps none"
    add("--checkpoint-epoch", text, bounded_int(0), 0)
    text = """keep the checkpoints of the last N epochs as checkpoint_<epoch>.pth.tar; 1 keeps only
        checkpoint.pth.tar"""
    add("--checkpoint-hist", text, bounded_int(1), 1)
    text = "steps between two rows of train_batch.log, TensorBoard points or printed lines"
    add("-p --print-freq", text, bounded_int(1), 10)
    add("--msg", "print one line per batch", str2bool, False)
    add("--save-plot", "draw the curves, TrainingPlots.png", str2bool, True)
    add("--tensorboardX --tensorboard", "write TensorBoard events", str2bool, True)


def add_advanced_flags(parser: Parser) -> None:
    """Add the flags that few runs need."""
    add = parser.add_group("advanced: deconvolution")
    steps = bounded_int(1, MAX_NEWTON_STEPS)
    add("--stem-iter", "--deconv-iter of the first layer", steps, default_text="as --deconv-iter")
    text = """algorithm for the inverse square root of the covariance: newton, the published
        Newton-Schulz iteration; resolvent, the same within 0.75 % and faster for large blocks;
        cholesky, the fastest, which whitens with a triangular factor in place of the root"""
    roots = ("newton", "resolvent", "cholesky")
    add("--root", text, None, "cholesky", choices=roots)
    text = """--root for the last fully connected layer, and for every linear layer that whitens in
        simple_v1 and mlp"""
    like_root = "as --root, but resolvent in place of cholesky"
    add("--root-final --root-fc", text, default_text=like_root, choices=roots)
    text = """modes 1, 2 and 5: estimate a covariance of F features from about N * F rows, where a
        patch gives one row for each block. The patches are spread over the images of a batch; 0
        uses every patch that --stride selects"""
    rows = "24, and at least 2048 rows"
    add("--rows-per-feature", text, bounded_float(minimum=0), default_text=rows)
    text = """contiguous: a block has adjacent channels; interleaved: (channel, pixel) features
        in modes 4 and 5, and channels in the other modes, are dealt to the blocks in turn"""
    add("--layout", text, None, "interleaved", choices=("contiguous", "interleaved"))
    text = "use one whitening matrix for all blocks of a layer; False: one for each block"
    add("--share-blocks", text, str2bool, True)
    text = """normalize each image by its own statistics before every layer that whitens: layernorm,
        mean and standard deviation; l1norm, mean absolute value"""
    add("--norm-type", text, None, "none", choices=("none", "layernorm", "l1norm"))
    text = """first layer: alternate between batch statistics for --freeze-iter steps and running
        statistics for 9 times as many"""
    add("--freeze", text, str2bool, False)
    add("--freeze-iter", "steps with batch statistics in a cycle of --freeze", bounded_int(1), 100)
    text = "compute statistics over the batch of all devices; False: each device over its own part"
    add("--sync-stats", text, str2bool, True)

    add = parser.add_group("advanced: training and output")
    text = "start the epoch count and the learning rate schedule after N epochs"
    add("--start-epoch", text, bounded_int(0), 0)
    text = "also save the checkpoint every N optimizer steps; 0 saves only after each epoch"
    add("--checkpoint-steps", text, bounded_int(0), 0)

    add = parser.add_group("advanced: devices and machines")
    text = "store images and 4-d weights in channels_last memory format, faster on some devices"
    add("--channels-last", text, str2bool, False)
    text = """capture a training step as a CUDA graph, which saves the time to launch kernels; with
        deconvolution on several GPUs, add --sync-stats False"""
    default = "True on one GPU without --compile or --accum-steps"
    add("--cuda-graphs", text, str2bool, default_text=default)
    text = "use only operations with reproducible results, which may be slower on a GPU"
    add("--deterministic", text, str2bool, False)
    text = "start one process per GPU; accepted for compatibility, always on"
    add("--multiprocessing-distributed", text, str2bool, False, default_text="")
    text = "number of machines that train together; not needed under torchrun"
    add("--world-size", text, bounded_int(1, 10**5), default_text=1)
    add("--rank", "index of this machine, from 0", bounded_int(0, 10**5))
    text = """address where machines meet: tcp://HOST:PORT of the first machine, or env:// to read
        MASTER_ADDR and MASTER_PORT"""
    add("--dist-url", text, rendezvous_url, metavar="URL")
    default, backends = "nccl on GPUs, else gloo", ("nccl", "gloo")
    add("--dist-backend", "communication backend", None, None, default, choices=backends)
