"""Time the training steps of all arms of `rivals.py` in turn, and count their FLOPs.

    python scripts/paper/rivals_steps.py                        writes results/rivals_steps.json
    python scripts/paper/rivals_steps.py --network vgg11 --rounds 3 --json FILE

The arms of a network take one step each in every round, in one process, so other work on the
machine affects all alike. A step is zero_grad, forward, loss, backward and the optimizer, on random
images. The time is the median over the rounds; a ratio is the median over the rounds' ratios to
BatchNorm with SGD. FLOPs are those that torch.utils.flop_counter counts in one step: products of
matrices and convolutions, without factorizations. Networks measured earlier in FILE are kept.
"""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.bench.steps import describe_environment, read_clock
from scripts.paper import rivals, rivals_arms, rivals_train
from scripts.paper.records import RESULTS, read_or_exit
from util.cli.parser import Parser, bounded_int, path_name
from util.cli.settings import read_settings
from util.data.images import DataSpec
from util.files import atomic_write
from util.training.accelerator import Accelerator

BASE = "bn-sgd"  # arm of the ratios
CIFAR10 = DataSpec("cifar10", 3, 32, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)

Step = Callable[[], float]  # -> loss


def main(argv: Sequence[str] | None = None) -> None:
    flags = make_parser().parse_args(argv)
    torch.set_num_threads(flags.threads)
    file = Path(flags.json)
    content = read_or_exit(file) if file.exists() else {"rows": []}
    content |= {"environment": describe_environment(torch.device("cpu")), "rounds": flags.rounds}
    for network in flags.network:
        kept = [row for row in content["rows"] if row["network"] != network]
        content["rows"] = kept + measure(network, flags)
        with atomic_write(file) as stream:
            stream.write(json.dumps(content, indent=1).encode() + b"\n")
        for row in content["rows"][len(kept) :]:
            print(
                f"{network:8}  {row['arm']:14}  {1000 * row['seconds']:8.0f} ms  "
                f"{row['ratio']:5.2f}  {row['flops'] / 1e9:8.1f} GFLOP",
                flush=True,
            )


def make_parser() -> Parser:
    parser = Parser("rivals_steps.py", __doc__.splitlines()[0])
    add, names = parser.add_group("measurement"), list(rivals_arms.NETWORKS)
    form = {"nargs": "+", "choices": names}
    add("--network", "networks to measure", None, names, "all", **form)
    add("--rounds", "measured steps of each arm", bounded_int(2), 5)
    add("--warmup", "steps of each arm before the measurement", bounded_int(0), 1)
    text = "images in a step"
    add("--batch-size", text, bounded_int(2), None, "that of the network", metavar="N")
    add("--threads", "CPU threads", bounded_int(1, 1024), 1)
    file = RESULTS / f"{rivals.TIMES}.json"
    add("--json", "write all times to FILE", path_name, str(file), "results/", metavar="FILE")
    return parser


def measure(network: str, flags: Namespace) -> list[dict[str, Any]]:
    """Return a row per arm: seconds, quartiles, ratio to BatchNorm with SGD, FLOPs."""
    steps = {arm: make_step(network, arm, flags) for arm in rivals_arms.ARMS}
    counts = {arm: count_flops(step) for arm, step in steps.items()}
    times: dict[str, list[float]] = {arm: [] for arm in steps}
    for number in range(flags.warmup + flags.rounds):
        for arm, step in steps.items():
            start = read_clock()
            step()
            if number >= flags.warmup:
                times[arm].append(read_clock() - start)
    rows = []
    for arm, seconds in times.items():
        lower, middle, upper = quantiles(seconds, n=4, method="inclusive")
        ratios = [one / base for one, base in zip(seconds, times[BASE], strict=True)]
        timed = {"seconds": middle, "quartiles": [lower, upper], "ratio": median(ratios)}
        rows.append({"network": network, "arm": arm, **timed, "flops": counts[arm]})
    return rows


def make_step(network: str, arm: str, flags: Namespace) -> Step:
    """Return the training step of an arm, at the first rate of its search."""
    case = network, arm
    rate = rivals.search(case, lambda name: None)[0][0]
    words = shlex.split(rivals_arms.make_flags(case, rate, seed=0))
    settings, _ = read_settings(rivals_train.build_script(), words)
    torch.manual_seed(0)
    model = rivals_train.build_network(settings, CIFAR10).train()
    precision = {"amp": settings.amp, "channels_last": settings.channels_last}
    accelerator = Accelerator(torch.device("cpu"), **precision)
    accelerator.to_device(model)
    optimizer = rivals_train.choose_builders(settings).optimizer(settings, model)
    count = flags.batch_size or settings.batch_size
    batch = torch.randn(count, 3, 32, 32), torch.randint(10, (count,))
    images, targets = accelerator.batch_to_device(*batch)

    def step() -> float:
        optimizer.zero_grad()
        with accelerator.autocast():
            loss = cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def count_flops(step: Step) -> int:
    """Return the FLOPs of one step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
