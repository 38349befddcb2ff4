"""Train linear and logistic regression and a perceptron, with and without whitening.

    python scripts/paper/regression.py --cifar10 DIR --data DIR --jobs 2

`simple_v1` trains on CIFAR-10 and Fashion-MNIST with squared error (L2) and cross-entropy (CE),
`mlp` on Fashion-MNIST: methods 1 to 4 at four learning rates each, one epoch. Full-batch gradient
descent on Fashion-MNIST follows, without momentum; whitened input needs about one step.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper.records import Records
from scripts.paper.runner import TRAIN_IMAGES, FindTop1, Recipe, Run, count_steps, main
from scripts.paper.tables import DASH, format_table, show_loss, show_top1
from util.tracking.plots import plot_losses

TITLES = {"cifar10": "CIFAR-10", "fashion": "Fashion-MNIST"}
METHODS = {1: "plain", 2: "whitened channels", 3: "whitened jointly", 4: "whitened in blocks of 32"}
CASES = (  # dataset, network, loss
    ("cifar10", "simple_v1", "L2"),
    ("cifar10", "simple_v1", "CE"),
    ("fashion", "simple_v1", "L2"),
    ("fashion", "simple_v1", "CE"),
    ("fashion", "mlp", "CE"),
)
RATES = (1.0, 0.1, 0.01, 0.001)
BATCH_SIZE = 512
LAST = 10  # points of a curve that the final loss averages
# Learning rates of full-batch descent. With whitened input, 1 suits every direction. Without, the
# rate must stay below 2 over the largest eigenvalue of the second moment, which is 431 here.
DESCENT = {1: 0.004, 3: 1.0}
DESCENT_STEPS = 20
SHOWN_STEPS = (1, 2, 3, 5, 10, 20)
SECONDS = {"cifar10": 60.0, "fashion": 40.0}
DESCENT_SECONDS = {1: 60.0, 3: 600.0}

Case = tuple[str, str, str]


def plan(find_top1: FindTop1) -> list[Run]:
    runs = [make_run(*choice) for choice in product(CASES, METHODS, RATES)]
    return runs + [make_descent(method) for method in DESCENT]


def make_run(case: Case, method: int, rate: float) -> Run:
    dataset, arch, loss = case
    flags = f"--arch {arch} --method {method} --loss {loss} --lr {rate:g} --wd 5e-4 --seed 0"
    flags += f" --epochs 1 --batch-size {BATCH_SIZE} --print-freq 1"
    steps = count_steps(dataset, BATCH_SIZE)
    return Run(name_run(case, method, rate), dataset, flags, steps, SECONDS[dataset])


def make_descent(method: int) -> Run:
    flags = f"--arch simple_v1 --method {method} --loss L2 --lr {DESCENT[method]:g} --wd 0 --seed 0"
    flags += f" --momentum 0 --lr-scheduler step --epochs {DESCENT_STEPS} --print-freq 1"
    flags += f" --batch-size {TRAIN_IMAGES['fashion']}"
    flags += " --eps 1e-5 --stem-iter 15" if method != 1 else ""
    name = name_descent(method)
    return Run(name, "fashion", flags, DESCENT_STEPS, DESCENT_SECONDS[method])


def name_run(case: Case, method: int, rate: float) -> str:
    return f"{'-'.join(case)}-method{method}-lr{rate:g}"


def name_descent(method: int) -> str:
    return f"fashion-descent-method{method}"


def final_loss(record: dict[str, Any] | None) -> float | None:
    """Return the training loss at the end, None for a missing or diverged run."""
    if not record or "diverged" in record:
        return None
    losses = [loss for _, loss in record["curve"][-LAST:]]
    return None if None in losses else sum(losses) / len(losses)


def choose_rate(case: Case, method: int, records: Records) -> float | None:
    """Return the learning rate with the lowest final training loss, None without a run."""
    losses = {rate: final_loss(records.get(name_run(case, method, rate))) for rate in RATES}
    finished = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(finished, key=finished.__getitem__) if finished else None


def format_tables(records: Records) -> dict[str, str]:
    header = ["dataset", "network", "loss", "method"]
    header += [f"training loss, lr {rate:g}" for rate in RATES]
    header.append("test top-1 (%) at the best lr")
    rows = [_format_case(case, method, records) for case, method in product(CASES, METHODS)]
    steps = ["method", "lr", *(f"loss, step {step}" for step in SHOWN_STEPS)]
    descents = [_format_descent(method, records) for method in DESCENT]
    return {"epoch": format_table(header, rows), "descent": format_table(steps, descents)}


def _format_case(case: Case, method: int, records: Records) -> list[str | None]:
    cells = []
    for rate in RATES:
        record = records.get(name_run(case, method, rate), {})
        loss = final_loss(record)
        diverged = f"diverged at step {record.get('diverged', DASH)}"
        cells.append(diverged if record and loss is None else show_loss(loss, 3))
    best = choose_rate(case, method, records)
    top1 = None if best is None else show_top1(records, [name_run(case, method, best)])
    dataset, arch, loss = case
    return [TITLES[dataset], f"`{arch}`", loss, f"{method} {METHODS[method]}", *cells, top1]


def _format_descent(method: int, records: Records) -> list[str]:
    record = records.get(name_descent(method))
    losses = dict(record["curve"]) if record else {}
    cells = [show_loss(losses.get(step), 4) for step in SHOWN_STEPS]
    return [f"{method} {METHODS[method]}", f"{DESCENT[method]:g}", *cells]


def draw(records: Records, path: Path) -> None:
    """Plot training loss against step: one panel per case, and one for full-batch descent."""
    panels = {}
    for case in CASES:
        rates = {method: choose_rate(case, method, records) for method in METHODS}
        names = {m: name_run(case, m, rate) for m, rate in rates.items() if rate is not None}
        title = f"{TITLES[case[0]]}, {case[1]}, {case[2]}, batch size {BATCH_SIZE}"
        panels[title] = _list_curves(names, rates, records)
    names = {method: name_descent(method) for method in DESCENT}
    title = "Fashion-MNIST, simple_v1, L2, full batch"
    plot_losses({**panels, title: _list_curves(names, DESCENT, records)}, path)


def _list_curves(
    names: Mapping[int, str], rates: Mapping[int, float | None], records: Records
) -> dict[str, Any]:
    """Return the curves of runs by method and learning rate."""
    ran = {method: records[name]["curve"] for method, name in names.items() if name in records}
    return {f"{m} {METHODS[m]}, lr {rates[m]:g}": curve for m, curve in ran.items()}


RECIPE = Recipe("regression", "Linear and logistic regression", plan, format_tables, draw)

if __name__ == "__main__":
    main(RECIPE)
