"""Compare the updates of deconvolution and Muon in the first steps of the network of airbench.

    python scripts/paper/rivals_diagnosis.py --data DIR      writes results/rivals_diagnosis.json

DIR holds images as train/CLASS/* and test/CLASS/*. BatchNorm with Muon and deconvolution with Muon
take the first steps of their runs in `rivals.py`, on the same batches, but in float32, and both
with a plain last layer and the rates of airbench for biases and last layer. Chosen steps are
measured before the update, layer by layer; the table has medians over the layers.

G is the gradient by the kernel that acts on the (centred) input: W, or W D with deconvolution. D
whitens blocks of the layer's input, as the layer of deconvolution does. C is the covariance of all
features of an input patch, eps added.

- cosine: of an update of that kernel with Muon's, orth(G).
  gradient: G. half whitened: G (D^T D)^(1/2). whitened: G D^T D, a step of W along its gradient
  with deconvolution. both: orth(G D^T) D, a step of W by Muon with deconvolution.
- condition and evenness: largest over smallest eigenvalue l, and (sum l)^2 / (n sum l^2), 1 for
  equal ones. Of G G^T, also for G D^T, G D^T D and orth(G) in place of G; G^T G has the same
  non-zero eigenvalues. Of C, and of D C D^T.
- outputs: deviation of a channel of the convolution, as median and deciles over the channels.
- GELU: the same of its inputs, behind pooling and norm; mean: median of mean / deviation.
- change: deviation of the outputs' change by one step of Muon, over the outputs' deviation.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import main as main_script
from deconv import FastDeconv
from deconv.conv import find_geometry
from deconv.ops.blocks import Blocks, transform_along
from deconv.ops.covariance import mean_and_covariance
from deconv.ops.patches import sample
from models import init_from_images
from scripts.bench.steps import describe_environment
from scripts.paper import rivals_train
from scripts.paper.airbench import BIAS_RATE, HEAD_RATE, orthogonalize
from scripts.paper.records import RESULTS, round_floats
from scripts.paper.rivals_arms import NETWORKS, make_flags
from scripts.paper.tables import format_table
from util.cli.parser import Parser, bounded_float, bounded_int, path_name
from util.cli.settings import read_settings
from util.data.images import DataSpec
from util.data.loader import ImageLoader
from util.distributed.world import World
from util.files import atomic_write
from util.random_state import seed_everything
from util.training.resume import Plan
from util.training.session import RunContext

ARMS = ("bn-muon", "deconv-muon")
COMMON = f"--amp off --num-groups-final 0 --bias-rate {BIAS_RATE} --head-rate {HEAD_RATE}"
ROWS = 8  # sampled patches per feature behind C
DECILES = (0.1, 0.5, 0.9)

Values = dict[str, float]


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    flags = parser.parse_args(argv)
    if (last := max(flags.measure)) > flags.steps:
        parser.error(f"--measure {last} is after the last step, --steps {flags.steps}")
    torch.set_num_threads(flags.threads)
    contexts = {arm: make_context(arm, flags) for arm in ARMS}
    spec, loader, _ = main_script.load_images(contexts[ARMS[0]])
    if flags.steps >= len(loader):
        parser.error(f"--steps {flags.steps}: must be below the {len(loader)} steps of an epoch")
    settings = {name: getattr(flags, name) for name in ("lr", "seed", "batch_size", "steps")}
    content = {"settings": settings, "environment": describe_environment(torch.device("cpu"))}
    content["arms"] = {arm: run(context, spec, loader) for arm, context in contexts.items()}
    print(format_content(content))
    with atomic_write(Path(flags.json)) as file:
        file.write(json.dumps(round_floats(content), indent=1).encode() + b"\n")


def make_parser() -> Parser:
    parser = Parser("rivals_diagnosis.py", __doc__.splitlines()[0])
    add, network = parser.add_group("measurement"), NETWORKS["airbench"]
    add("--data", "folder of the images", path_name, metavar="DIR", required=True)
    add("--cache-dir", "keep decoded images in DIR", path_name, metavar="DIR")
    add("--steps", "training steps of each arm", bounded_int(0), 12)
    add("--measure", "numbers of the measured steps", bounded_int(0), [0, 4, 12], nargs="+")
    add("--batch-size", "images in a step", bounded_int(2), network.batch_size, metavar="N")
    add("--lr", "learning rate of Muon", bounded_float(minimum=0), 0.24)
    add("--seed", "seed of the run", bounded_int(0), 0)
    add("--threads", "CPU threads", bounded_int(1, 1024), 1)
    file = RESULTS / "rivals_diagnosis.json"
    add("--json", "write all values to FILE", path_name, str(file), "results/", metavar="FILE")
    return parser


def make_context(arm: str, flags: Namespace) -> RunContext:
    """Return the settings of an arm, and this process; `measure` are the measured steps."""
    line = make_flags(("airbench", arm), flags.lr, flags.seed)
    words = [*line.split(), *COMMON.split(), "--batch-size", str(flags.batch_size)]
    words += ["--dataset", "folder", "--data", flags.data]
    words += ["--cache-dir", flags.cache_dir] if flags.cache_dir else []
    settings, _ = read_settings(rivals_train.build_script(), words)
    settings.steps, settings.measure = flags.steps, flags.measure
    return RunContext(settings, None, World(), torch.device("cpu"), None)


def run(context: RunContext, spec: DataSpec, loader: ImageLoader) -> dict[str, Any]:
    """Train as in `rivals_train.py`; return all losses, and values by measured step and layer."""
    flags = context.flags
    seed_everything(flags.seed)
    model = rivals_train.build_network(flags, spec).train()
    init_from_images(model, loader.draw_images)
    loader = rivals_train.augment_as_airbench(loader, context)
    loader.batch_sampler.set_epoch(1)
    builders = rivals_train.choose_builders(flags)
    optimizer, total = builders.optimizer(flags, model), NETWORKS["airbench"].steps
    scheduler = builders.scheduler(flags, optimizer, Plan(len(loader), total, 0), 0)
    losses, measured = [], {}
    for number, (images, targets) in enumerate(islice(loader, flags.steps + 1)):
        watch = Watch(model.groups) if number in flags.measure else None
        optimizer.zero_grad()
        loss = cross_entropy(model(images), targets, label_smoothing=flags.label_smoothing)
        loss.backward()
        losses.append(loss.item())
        if watch is not None:
            measured[str(number)] = watch.measure(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        print(f"step {number}  loss {losses[-1]:.4f}", flush=True)
    return {"losses": losses, "steps": measured}


class Watch:
    """Keep inputs of convolutions and moments of channels during the next forward of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        self.gelus = [m for m in model.modules() if isinstance(m, nn.GELU)]
        self.inputs: dict[nn.Module, Tensor] = {}
        self.channels: dict[nn.Module, Values] = {}
        modules = [*self.convs.values(), *self.gelus]
        self.hooks = [module.register_forward_hook(self._keep) for module in modules]

    def _keep(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.inputs[module] = x = args[0].detach()
        self.channels[module] = describe_channels(x if module in self.gelus else output.detach())

    @torch.no_grad()
    def measure(self, rate: float) -> dict[str, Values]:
        """Return the values of each layer, after the backward pass."""
        layers = {}
        for (name, conv), gelu in zip(self.convs.items(), self.gelus, strict=True):
            values = measure_layer(conv, self.inputs[conv], rate)
            values |= {f"outputs: {key}": v for key, v in self.channels[conv].items()}
            layers[name] = values | {f"GELU: {key}": v for key, v in self.channels[gelu].items()}
        for hook in self.hooks:
            hook.remove()
        return layers


def describe_channels(x: Tensor) -> Values:
    """Return deciles of the deviations of channels, and the median mean in deviations."""
    deviation, mean = torch.std_mean(x, (0, 2, 3), correction=0)
    found = deviation.quantile(torch.tensor(DECILES, dtype=x.dtype)).tolist()
    values = {f"decile {10 * share:g}": v for share, v in zip(DECILES, found, strict=True)}
    return values | {"mean": (mean / deviation).median().item()}


def measure_layer(conv: nn.Conv2d, x: Tensor, rate: float) -> Values:
    """Return the values of a layer by its input and the gradient of its weight."""
    cov, blocks, root = find_whitening(conv, x)
    D = expand(root, blocks)
    weight, gradient = conv.weight.flatten(1), conv.weight.grad.flatten(1)
    kernel, update = weight * len(weight) ** 0.5 / weight.norm(), orthogonalize(gradient)
    if isinstance(conv, FastDeconv):  # the gradient of W is G D^T
        gradient = torch.linalg.solve(D.mT, gradient, left=False)
        kernel, update = kernel @ D, update @ D
    change = rate * (update @ cov * update).sum().sqrt() / (kernel @ cov * kernel).sum().sqrt()
    values, vectors = torch.linalg.eigh(root.mT @ root)
    half = expand(vectors @ (values.clamp(min=0).sqrt()[..., None] * vectors.mT), blocks)
    found = {"change": change.item(), **compare_updates(gradient, D, half)}
    for name, matrix in {"C": cov, "D C D^T": D @ cov @ D.mT}.items():
        found |= describe_spectrum(name, torch.linalg.eigvalsh(matrix))
    return found


def find_whitening(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Blocks, Tensor]:
    """Return C (F, F), the blocks of deconvolution, and D of a block (G, d, d)."""
    shape, geometry = (conv.in_channels, conv.out_channels, conv.kernel_size), find_geometry(conv)
    ours = conv if isinstance(conv, FastDeconv) else FastDeconv(*shape, **geometry)
    whole = {"block": conv.in_channels, "rows_per_feature": ROWS, **geometry}
    sampling, one = FastDeconv(*shape, **whole).choose_patches(x)
    cov = mean_and_covariance(sample(x, sampling), one).cov[0]
    cov.diagonal().add_(ours.eps)
    return cov, ours.blocks, ours.batch_whitening(x)[4]["joint"]


def expand(matrices: Tensor, blocks: Blocks) -> Tensor:
    """Return the matrix (F, F) that acts on all features as (G, d, d) act on their blocks."""
    identity = torch.eye(blocks.channels * blocks.taps, dtype=matrices.dtype)[..., None]
    return transform_along("joint", identity, matrices.mT, blocks)[..., 0]


def compare_updates(gradient: Tensor, D: Tensor, half: Tensor) -> Values:
    """Return the cosines of updates with Muon's, and the spectra of the gradients."""
    received, muon = gradient @ D.mT, orthogonalize(gradient)
    updates = {"gradient": gradient, "half whitened": gradient @ half, "whitened": received @ D}
    updates["both"] = orthogonalize(received) @ D
    found = {
        f"cosine: {name}": ((update * muon).sum() / (update.norm() * muon.norm())).item()
        for name, update in updates.items()
    }
    spectra = {"G": gradient, "G D^T": received, "G D^T D": received @ D, "orth(G)": muon}
    for name, matrix in spectra.items():
        found |= describe_spectrum(name, torch.linalg.svdvals(matrix.double()).square())
    return found


def describe_spectrum(name: str, values: Tensor) -> Values:
    """Return condition and evenness of eigenvalues."""
    evenness = values.sum().square() / (len(values) * values.square().sum())
    condition = values.max() / values.min().clamp(min=torch.finfo(values.dtype).tiny)
    return {f"{name}: condition": condition.item(), f"{name}: evenness": evenness.item()}


def format_content(content: dict[str, Any]) -> str:
    """Return a table of the losses, and one of medians over the layers."""
    arms = content["arms"]
    losses = zip(*(arm["losses"] for arm in arms.values()), strict=True)
    rows = [[step, *(f"{loss:.4f}" for loss in row)] for step, row in enumerate(losses)]
    steps = [(name, step) for name, arm in arms.items() for step in arm["steps"]]
    columns = [[*arms[name]["steps"][step].values()] for name, step in steps]
    medians = [
        [key, *(f"{median(layer[key] for layer in layers):.3g}" for layers in columns)]
        for key in columns[0][0]
    ]
    header = ["median of", *(f"{name}, step {step}" for name, step in steps)]
    return f"{format_table(['step', *arms], rows)}\n{format_table(header, medians)}"


if __name__ == "__main__":
    main()
