"""Fine-tune a network trained with BatchNorm, unchanged and converted to deconvolution.

    python scripts/paper/fine_tuning.py --data DIR --arch vgg11
    python scripts/paper/fine_tuning.py --data DIR --arch timm/mobilenetv3_small_100 --image-size 64

1. Train the network with BatchNorm for --begin steps, once.
2. Fine-tune each arm for --steps steps at each rate of --lr with the first seed. The arms are
   BatchNorm, the converted network, and the converted and calibrated network.
3. Fine-tune each arm at its best rate with the other seeds.

DIR contains images as train/CLASS/* and test/CLASS/*. The optimizer is SGD with momentum 0.9,
weight decay 5e-4 and a cosine schedule. The loss at the start is the mean over ten training
batches, in training mode. --skip and --eps are passed to `convert`. Finished trainings in --out
are reused. --plot draws the losses of the first seed, one panel for each network in --out.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from statistics import mean
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from deconv import convert
from models import ARCHITECTURES, build_imagenet_model, build_model, make_layers
from scripts.paper.tables import format_table
from util.cli.parser import Parser, bounded_float, bounded_int, path_name
from util.data.datasets import build_loaders
from util.data.loader import ImageLoader, LoaderOptions
from util.files import atomic_write
from util.random_state import seed_everything
from util.tracking.plots import plot_losses
from util.training.optim import build_optimizer, build_scheduler

ARMS = {
    "bn": "BatchNorm",
    "converted": "deconvolution, converted",
    "calibrated": "deconvolution, converted and calibrated",
}
EPS = 0.01  # default of `convert`
START_BATCHES = 10  # batches of the loss at the start
SMOOTHED = 10  # steps that one point of the plot averages
PANEL_NAME = "panel.json"
IMAGES_NAME = "images.json"  # images and batches of the trainings in a folder

Result = dict[str, Any]  # of one training
Panel = dict[str, list[tuple[float, float]]]  # pairs (step, loss) by label
Batches = Iterator[tuple[Tensor, Tensor]]


def main(argv: Sequence[str] | None = None) -> None:
    flags = make_parser().parse_args(argv)
    torch.set_num_threads(flags.threads)
    study = Study(flags)
    results = {arm: study.run_arm(arm) for arm in ARMS}
    print(format_results(results, study.begin()["test_top1"], flags), flush=True)
    study.write_panel(list_curves(results))
    if flags.plot:
        plot_losses(read_panels(Path(flags.out)), flags.plot)


class Study:
    """Trainings of one network, with results cached in the folder --out."""

    def __init__(self, flags: Namespace) -> None:
        self.flags = flags
        self.folder = Path(flags.out) / flags.arch.replace("/", "-")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.check_images()

    def check_images(self) -> None:
        """Exit if the folder has trainings on other images or batches, whose names are equal."""
        images = {name: getattr(self.flags, name) for name in ("image_size", "batch_size")}
        images["data"] = str(Path(self.flags.data).resolve())
        file = self.folder / IMAGES_NAME
        if not file.exists():
            with atomic_write(file) as stream:
                stream.write(json.dumps(images).encode())
        for name, before in json.loads(file.read_text()).items():
            if before != images[name]:
                flag = f"--{name.replace('_', '-')}"
                sys.exit(f"{self.folder} has trainings with {flag} {before}: choose another --out")

    def run_arm(self, arm: str) -> dict[float, list[Result]]:
        """Return the results of an arm by rate: all seeds at the best rate, one seed elsewhere."""
        first, *others = self.flags.seeds
        results = {lr: [self.fine_tune(arm, lr, first)] for lr in self.flags.lr}
        best = find_best(results)
        results[best] += [self.fine_tune(arm, best, seed) for seed in others]
        return results

    def begin(self) -> Result:
        """Train with BatchNorm from scratch and save the weights."""
        flags = self.flags

        def run() -> Result:
            seed_everything(0)
            network = build_network(flags)
            curve = train(network, self.load(0), flags.begin_lr, flags.begin)
            torch.save(network.state_dict(), self.weights)
            return {"curve": curve, "test_top1": test(network, self.load(0)[1])}

        return self.remember(f"begin-lr{flags.begin_lr:g}-steps{flags.begin}", run)

    @property
    def weights(self) -> Path:
        return self.folder / f"begin-lr{self.flags.begin_lr:g}-steps{self.flags.begin}.pt"

    def fine_tune(self, arm: str, lr: float, seed: int) -> Result:
        """Fine-tune an arm from the saved weights."""
        begin, flags = self.begin(), self.flags

        def run() -> Result:
            loaders = self.load(1 + seed)
            seed_everything(1 + seed)
            network = build_network(flags)
            network.load_state_dict(torch.load(self.weights, weights_only=True))
            if arm != "bn":
                batches = iterate(loaders[0]) if arm == "calibrated" else None
                options = {"eps": flags.eps, "skip": flags.skip}
                network = convert(network, pretrained=True, calibrate=batches, **options)
            start = measure_start(network, loaders[0])
            curve = train(network, loaders, lr, flags.steps)
            top1 = test(network, loaders[1])
            return {"start": start, "curve": curve, "test_top1": top1, "begin": begin["test_top1"]}

        kind = arm if arm == "bn" else arm + name_conversion(flags)
        name = f"{kind}-lr{lr:g}-steps{flags.steps}-seed{seed}-from-{self.weights.stem}"
        return self.remember(name, run)

    def write_panel(self, curves: Panel) -> None:
        """Write the curves of this network for the plot of all networks."""
        flags = self.flags
        title = f"{flags.arch}, from {flags.begin} steps with BatchNorm"
        with atomic_write(self.folder / PANEL_NAME) as stream:
            stream.write(json.dumps({"title": title, "curves": curves}).encode())

    def load(self, seed: int) -> tuple[ImageLoader, ImageLoader]:
        """Return the loaders of training and test images."""
        flags = self.flags
        options = LoaderOptions(
            batch_size=flags.batch_size, image_size=flags.image_size, seed=seed, num_workers=0
        )
        train, test = build_loaders("folder", flags.data, options, cache_dir=Path(flags.out))[1:]
        if len(train.dataset) < flags.batch_size:
            sys.exit(f"--batch-size {flags.batch_size}: there are {len(train.dataset)} images")
        return train, test

    def remember(self, name: str, run: Callable[[], Result]) -> Result:
        """Return the cached result of this name, or run the training and cache its result."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            result = run()
            with atomic_write(file) as stream:
                stream.write(json.dumps(result).encode())
            print(f"{name}: test top-1 {result['test_top1']:.2f} %", flush=True)
        return json.loads(file.read_text())


def name_conversion(flags: Namespace) -> str:
    """Return the part of a file name that tells --eps and --skip, "" for the defaults."""
    eps = "" if flags.eps == EPS else f"-eps{flags.eps:g}"
    return eps + "".join(f"-skip-{quote(pattern, safe='')}" for pattern in flags.skip)


def build_network(flags: Namespace) -> nn.Module:
    """Build the network with BatchNorm."""
    build = build_model if flags.arch in ARCHITECTURES else build_imagenet_model
    layers = make_layers(deconv=False)
    return build(flags.arch, layers, num_classes=10, image_size=flags.image_size)


def iterate(loader: ImageLoader, first_epoch: int = 1) -> Batches:
    """Yield the full batches of all epochs from `first_epoch` on."""
    for epoch in count(first_epoch):
        loader.batch_sampler.set_epoch(epoch)
        for images, targets in loader:
            if len(images) == loader.batch_sampler.batch_size:
                yield images, targets


def train(
    network: nn.Module, loaders: tuple[ImageLoader, ImageLoader], lr: float, steps: int
) -> list[float]:
    """Train the network; return the loss of each step."""
    optimizer = build_optimizer("SGD", network.parameters(), lr=lr, weight_decay=5e-4)
    scheduler = build_scheduler("cosine", optimizer, total_steps=steps, epoch_steps=steps)
    losses = []
    network.train()
    for images, targets in islice(iterate(loaders[0]), steps):
        loss = cross_entropy(network(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def measure_start(network: nn.Module, loader: ImageLoader) -> float:
    """Return the mean training-mode loss on batches not used by calibration; restore buffers."""
    kept = [(buffer, buffer.clone()) for buffer in network.buffers()]
    network.train()
    batches = islice(iterate(loader, first_epoch=1000), START_BATCHES)
    losses = [cross_entropy(network(images), targets).item() for images, targets in batches]
    for buffer, old in kept:
        buffer.copy_(old)
    return mean(losses)


@torch.no_grad()
def test(network: nn.Module, loader: ImageLoader) -> float:
    """Return the test top-1 in percent."""
    network.eval()
    hits = [(network(images).argmax(1) == targets).float() for images, targets in loader]
    return 100 * torch.cat(hits).mean().item()


def find_best(results: dict[float, list[Result]]) -> float:
    """Return the rate with the highest test top-1 of the first seed."""
    return max(results, key=lambda lr: results[lr][0]["test_top1"])


def format_results(
    results: dict[str, dict[float, list[Result]]], begin: float, flags: Namespace
) -> str:
    """Return a Markdown table with one row per arm, and the accuracy before fine-tuning."""
    header = ["network", "layers", "loss at the start", "top-1 (%) by lr", "best lr"]
    header += [f"top-1 (%) after {flags.steps} steps", "mean (%)"]
    rows = []
    for arm, by_rate in results.items():
        best = find_best(by_rate)
        start = mean(result["start"] for result in by_rate[best])
        screened = ", ".join(f"{lr:g}: {by_rate[lr][0]['test_top1']:.1f}" for lr in by_rate)
        top1 = [result["test_top1"] for result in by_rate[best]]
        shown = ", ".join(f"{value:.2f}" for value in top1)
        rows.append(
            [
                flags.arch,
                ARMS[arm],
                f"{start:.3f}",
                screened,
                f"{best:g}",
                shown,
                f"{mean(top1):.2f}",
            ]
        )
    return f"{format_table(header, rows)}\nBefore fine-tuning: test top-1 {begin:.2f} %."


def list_curves(results: dict[str, dict[float, list[Result]]]) -> Panel:
    """Return the smoothed training losses of the first seed, each arm at its best rate."""
    curves = {}
    for arm, by_rate in results.items():
        best = find_best(by_rate)
        losses = by_rate[best][0]["curve"]
        chunks = [losses[i : i + SMOOTHED] for i in range(0, len(losses), SMOOTHED)]
        points = [(i * SMOOTHED + len(chunk) / 2, mean(chunk)) for i, chunk in enumerate(chunks)]
        curves[f"{ARMS[arm]}, lr {best:g}"] = points
    return curves


def read_panels(folder: Path) -> dict[str, Panel]:
    """Return the curves of all networks in the folder --out, by title."""
    panels = [json.loads(file.read_text()) for file in sorted(folder.glob(f"*/{PANEL_NAME}"))]
    return {panel["title"]: panel["curves"] for panel in panels}


def make_parser() -> Parser:
    parser = Parser("fine_tuning.py", __doc__.splitlines()[0])
    add, rate = parser.add_group("study"), bounded_float(above=0)
    text = "folder of images, train/CLASS/* and test/CLASS/* of ten classes"
    add("--data", text, path_name, required=True, metavar="DIR")
    add("--arch", "network of main.py or main_imagenet.py", default="vgg11", metavar="NAME")
    add("--image-size", "side of the images, in pixels", bounded_int(32), 32, metavar="N")
    add("--batch-size", "images in a batch", bounded_int(2), 128, metavar="N")
    add("--begin", "steps with BatchNorm before fine-tuning", bounded_int(1), 391, metavar="N")
    add("--begin-lr", "learning rate of these steps", rate, 0.01, metavar="LR")
    add("--steps", "steps of fine-tuning", bounded_int(1), 200, metavar="N")
    text = "learning rates of fine-tuning"
    add("--lr", text, rate, [0.003, 0.01, 0.03], "0.003 0.01 0.03", nargs="+", metavar="LR")
    text = "layers that the conversion keeps, as patterns of names such as '*conv_dw*'"
    add("--skip", text, str, [], "none", nargs="+", metavar="PATTERN")
    text = "added to the diagonal of covariances, in units of variance"
    add("--eps", text, rate, EPS, metavar="E")
    add("--seeds", "seeds of the runs", bounded_int(0), [0, 1, 2], "0 1 2", nargs="+", metavar="N")
    add("--threads", "CPU threads", bounded_int(1, 1024), 1, metavar="N")
    add("--out", "write results to this folder", path_name, "runs/fine-tuning", metavar="DIR")
    add("--plot", "draw the losses into this file", path_name, None, "none", metavar="PNG")
    return parser


if __name__ == "__main__":
    main()
