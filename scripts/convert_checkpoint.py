"""Convert a checkpoint of the published scripts into one that our scripts test and resume.

    python scripts/convert_checkpoint.py PUBLISHED.pth.tar OUT [FLAGS of main.py]
    python scripts/convert_checkpoint.py vgg16.pth.tar RUN --dataset cifar10 --batch-size 128
    python main.py --resume RUN -e

    python scripts/convert_checkpoint.py PUBLISHED.pth.tar OUT DIR [FLAGS of main_imagenet.py]
    python main_imagenet.py --resume OUT -e DIR

OUT is a new folder. The flags set dataset, optimizer and length of the run. By default the network
is that of the checkpoint, with the published numerics: --root newton --eps 1e-5 --num-groups 64
--rows-per-feature 0, and the published --stem-iter and --freeze. A checkpoint with best_acc1 is one
of the ImageNet script; DIR holds train/ and val/.

Layers are matched by name, or in the known order of vgg, resnet, preact, senet and densenet. The
script refuses a checkpoint if a shape differs or a statistic cannot be reproduced. It then names
the layer and writes nothing. It also refuses files that may execute code.
"""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main as small_images
import main_imagenet as large_images
from scripts.published_networks import MOMENTUM, Layers, find_flags, read_layers, translate
from util.checkpoint.schema import HISTORY
from util.checkpoint.store import save_checkpoint
from util.cli.parser import report_errors
from util.cli.settings import read_settings
from util.distributed.world import World
from util.errors import CheckpointError
from util.random_state import seed_everything
from util.training.resume import Progress, TrainingState
from util.training.session import RunContext, optimizer_from_flags


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = small_images.build_script().parser
    parser.prog = "convert_checkpoint.py"
    if len(words) < 2 or words[0].startswith("-") or words[1].startswith("-"):
        print(__doc__)
        parser.exit(0 if "--help" in words or "-h" in words else 2)
    source, out, flags = Path(words[0]), Path(words[1]), words[2:]
    with report_errors(parser):
        if out.exists():
            raise CheckpointError(f"{out} already exists: choose a new folder for OUT")
        published = read_published(source)
    script = large_images if "best_acc1" in published else small_images
    built = script.build_script()
    built.parser.prog = parser.prog
    with report_errors(built.parser, ValueError):
        layers = read_layers(published["state_dict"], published.get("optimizer"))
        typed = built.parser.parse_typed(flags)
        if unfit := {"resume", "evaluate", "pretrained", "init"} & {*typed}:
            raise ValueError(f"--{min(unfit)} is for {script.__name__}.py, after the conversion")
        if "ema" in typed:
            raise ValueError("--ema does not apply: the published checkpoint has no average")
        arch = typed.get("arch", published["arch"])
        with name_file(source):
            found = {"arch": ("--arch", arch), **find_flags(arch, layers)}
        for name, default in found.items():
            flags += [] if name in typed else default
        settings, _ = read_settings(built, flags)
        context = RunContext(settings, None, World(), torch.device("cpu"), None)
        data = script.load_images(context)
        seed_everything(settings.seed)
        model = script.build_network(settings, data[0])
        with name_file(source):
            momenta = load_weights(arch, layers, model)
        state = make_state(context, data, model, published, momenta)
        save_new(state, out)
    words = [f"{script.__name__}.py", "--resume", str(out), "-e"]
    words += [settings.data] if script is large_images and settings.data else []
    command = f"python {shlex.join(words)}"
    print(f"{out}: epoch {state['epoch']}; test it with {command}")


def read_published(path: Path) -> dict[str, Any]:
    """Load a checkpoint of the published scripts without executing code in it."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # a foreign file may raise anything in the reader
        reason = "damaged, or it contains more than tensors and plain values, which may run code"
        raise CheckpointError(f"{path}: refused: {reason}") from error
    if type(saved) is not dict or not isinstance(saved.get("state_dict"), dict):
        raise CheckpointError(f"{path}: not a checkpoint of the published scripts (no state_dict)")
    if not all(type(k) is str and type(v) is Tensor for k, v in saved["state_dict"].items()):
        raise CheckpointError(f"{path}: state_dict has entries that are not tensors")
    if type(saved.get("epoch")) is not int or type(saved.get("arch")) is not str:
        raise CheckpointError(f"{path}: epoch (int) or arch (str) is missing")
    best = saved.get("best_acc", saved.get("best_acc1", 0))
    if not isinstance(best, int | float) and not (type(best) is Tensor and best.numel() == 1):
        raise CheckpointError(f"{path}: best_acc or best_acc1 must be a number, got {best!r}")
    return saved


@contextmanager
def name_file(source: Path) -> Iterator[None]:
    """Report what does not fit as an error of the file, in one line."""
    try:
        yield
    except (ValueError, RuntimeError, LookupError) as error:
        lines = str(error).splitlines()  # PyTorch lists the faults below a headline
        raise CheckpointError(f"{source}: {lines[min(1, len(lines) - 1)].strip()}") from error


def load_weights(arch: str, layers: Layers, model: nn.Module) -> dict[int, dict[str, Tensor]]:
    """Load published weights and statistics; return the momenta by number of the parameter.

    The momenta are empty if one is missing.
    """
    translated, folded = translate(arch, layers, model)
    for name in folded:
        print(f"{name}: folded into weights; outputs are equal, but training goes on without it")
    momenta, state = {}, {}
    for key, value in translated.items():
        name, _, tensor = key.rpartition(".")
        if tensor.startswith(MOMENTUM):
            momenta[f"{name}.{tensor.removeprefix(MOMENTUM)}"] = value
        else:
            state[key] = value
    model.load_state_dict(state)
    parameters = [name for name, _ in model.named_parameters()]
    if any(name not in momenta for name in parameters):
        return {}
    return {i: {"momentum_buffer": momenta[name]} for i, name in enumerate(parameters)}


def make_state(
    context: RunContext,
    data: Any,
    model: nn.Module,
    published: dict[str, Any],
    momenta: dict[int, dict[str, Tensor]],
) -> dict[str, Any]:
    """Return the checkpoint of a run that continues at the epoch of the published checkpoint."""
    flags, (spec, train_loader, test_loader) = context.flags, data
    epoch, steps = published["epoch"], len(train_loader)
    best = float(published.get("best_acc", published.get("best_acc1", -math.inf)))
    progress = Progress(epoch, epoch * steps, epoch * len(train_loader.dataset))
    if epoch and math.isfinite(best):
        progress.best_top1, progress.best_epoch, progress.best_step = best, epoch, progress.step
    optimizer = optimizer_from_flags(flags, model)
    loaders = train_loader, test_loader
    training = TrainingState(
        vars(flags), spec, loaders, model, optimizer, context.build_accelerator(), World(), progress
    )
    past = {"epoch": [*range(1, epoch + 1)], "step": [steps * n for n in range(1, epoch + 1)]}
    history = {**dict.fromkeys(HISTORY, [math.nan] * epoch), **past}
    state = training.capture()
    if momenta and flags.optimizer == "SGD" and not flags.no_decay_norm_bias:
        state["optimizer"]["state"] = momenta
    elif epoch:
        print("optimizer state omitted, because it does not fit the run: momentum starts at 0")
    return {**state, "history": history}


def save_new(state: dict[str, Any], out: Path) -> None:
    """Write a checkpoint into a new folder; after an error there is no folder."""
    out.mkdir(parents=True)
    try:
        save_checkpoint(state, out)
    except BaseException:
        shutil.rmtree(out)
        raise


if __name__ == "__main__":
    main()
