"""Convert a checkpoint of the published scripts into one that main.py tests and resumes.

    python scripts/convert_checkpoint.py PUBLISHED.pth.tar OUT [FLAGS of main.py]
    python scripts/convert_checkpoint.py vgg16.pth.tar RUN --dataset cifar10 --batch-size 128
    python main.py --resume RUN -e

OUT is a new folder. The flags set dataset, network, optimizer and length of the run. By default the
network has the architecture of the checkpoint and the published numerics: --deconv True --root
newton --eps 1e-5 --num-groups 64 --rows-per-feature 0.

Layers are matched in order. The script refuses a checkpoint if a shape differs or a statistic
cannot be reproduced. It then names the layer and writes nothing. It also refuses files that may
execute code.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main as small_images
from util.checkpoint.schema import HISTORY
from util.checkpoint.store import save_checkpoint
from util.cli.parser import report_errors
from util.cli.settings import read_settings
from util.distributed.world import World
from util.errors import CheckpointError
from util.random_state import seed_everything
from util.training.optim import build_optimizer
from util.training.resume import Progress, TrainingState
from util.training.session import RunContext

PUBLISHED = {
    "deconv": ("--deconv", "True"),
    "root": ("--root", "newton"),
    "eps": ("--eps", "1e-5"),
    "num_groups": ("--num-groups", "64"),
    "rows_per_feature": ("--rows-per-feature", "0"),
}
# Architectures whose layers have the same order here and in the published code.
IN_ORDER = ("vgg", "resnet")


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    script = small_images.build_script()
    parser = script.parser
    parser.prog = "convert_checkpoint.py"
    if len(words) < 2 or words[0].startswith("-") or words[1].startswith("-"):
        print(__doc__)
        parser.exit(0 if "--help" in words or "-h" in words else 2)
    source, out, flags = Path(words[0]), Path(words[1]), words[2:]
    with report_errors(parser, ValueError):
        if out.exists():
            raise ValueError(f"{out} already exists: choose a new folder for OUT")
        published = read_published(source)
        typed = parser.parse_typed(flags)
        if unfit := {"resume", "evaluate"} & {*typed}:
            raise ValueError(f"--{min(unfit)} is for main.py, after the conversion")
        for name, default in {**PUBLISHED, "arch": ("--arch", str(published["arch"]))}.items():
            flags += [] if name in typed else default
        settings, _ = read_settings(script, flags)
        if not settings.arch.startswith(IN_ORDER):
            raise ValueError(
                f"{source}: arch {settings.arch} cannot be converted, only {' and '.join(IN_ORDER)}"
            )
        context = RunContext(settings, None, World(), torch.device("cpu"), None)
        data = small_images.load_images(context)
        seed_everything(settings.seed)
        model = small_images.build_network(settings, data[0])
        load_weights(source, published["state_dict"], model)
        state = make_state(context, data, model, published)
        out.mkdir(parents=True)
        path = save_checkpoint(state, out)
    print(f"{path}: epoch {state['epoch']}; test it with python main.py --resume {out} -e")


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
    return saved


def load_weights(source: Path, state: dict[str, Tensor], model: nn.Module) -> None:
    """Load published weights and statistics into the model, layer by layer in order."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        *names, tensor = [part for part in key.split(".") if part != "module"]
        layers.setdefault(".".join(names), {})[tensor] = value
    layers = {name: tensors for name, tensors in layers.items() if "weight" in tensors}
    own: list[tuple[str, Any]] = [
        (name, layer) for name, layer in model.named_modules() if hasattr(layer, "weight")
    ]
    if len(layers) != len(own):
        raise ValueError(
            f"{source}: the network has {len(layers)} layers with weights, the network of the "
            f"flags {len(own)}: check --arch and --dataset"
        )
    renamed: dict[str, Tensor] = {}
    for (name, tensors), (own_name, layer) in zip(layers.items(), own, strict=True):
        if tensors["weight"].shape != layer.weight.shape:
            raise ValueError(
                f"{source}: {name}.weight has shape {(*tensors['weight'].shape,)}, "
                f"{own_name}.weight of the flags {(*layer.weight.shape,)}: check --arch"
            )
        renamed |= {f"{own_name}.{tensor}": value for tensor, value in tensors.items()}
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        fault = str(error).splitlines()[1]  # report the first of all errors
        raise ValueError(f"{source}: {fault.strip()}") from error


def make_state(
    context: RunContext, data: Any, model: nn.Module, published: dict[str, Any]
) -> dict[str, Any]:
    """Return the checkpoint of a run that continues at the epoch of the published checkpoint."""
    flags, (spec, train_loader, test_loader) = context.flags, data
    epoch, steps = published["epoch"], len(train_loader)
    best = float(published.get("best_acc", published.get("best_acc1", -math.inf)))
    progress = Progress(epoch, epoch * steps, epoch * len(train_loader.dataset))
    if epoch and math.isfinite(best):
        progress.best_top1, progress.best_epoch = best, epoch
    rates = {"lr": flags.lr, "momentum": flags.momentum, "weight_decay": flags.weight_decay}
    optimizer = build_optimizer(flags.optimizer, model.parameters(), **rates)
    loaders = train_loader, test_loader
    training = TrainingState(
        vars(flags), spec, loaders, model, optimizer, context.build_accelerator(), World(), progress
    )
    past = {"epoch": [*range(1, epoch + 1)], "step": [steps * n for n in range(1, epoch + 1)]}
    history = {**dict.fromkeys(HISTORY, [math.nan] * epoch), **past}
    state = training.capture()
    if (momenta := find_momenta(published.get("optimizer"), model)) and flags.optimizer == "SGD":
        state["optimizer"]["state"] = momenta
    elif epoch:
        print("optimizer state omitted, because it does not fit the network: momentum starts at 0")
    return {**state, "history": history}


def find_momenta(optimizer: Any, model: nn.Module) -> dict[int, dict[str, Tensor]]:
    """Return the momentum buffer of each parameter by index, or {} unless all of them fit."""
    parameters = list(model.parameters())
    try:
        keys = [key for group in optimizer["param_groups"] for key in group["params"]]
        momenta = [optimizer["state"][key]["momentum_buffer"] for key in keys]
        shapes = [(momentum.shape, momentum.dtype) for momentum in momenta]
    except (TypeError, KeyError, AttributeError):
        return {}
    if shapes != [(parameter.shape, parameter.dtype) for parameter in parameters]:
        return {}
    return {number: {"momentum_buffer": momentum} for number, momentum in enumerate(momenta)}


if __name__ == "__main__":
    main()
