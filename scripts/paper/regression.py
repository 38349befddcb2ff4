"""Linear and logistic regression, and a perceptron: training loss with and without whitening.

    python scripts/paper/regression.py --cifar10 DIR --data DIR --jobs 2

`simple_v1` on CIFAR-10 and Fashion-MNIST with squared error (L2) and cross-entropy (CE), `mlp` on
Fashion-MNIST; methods 1 to 4, each at four learning rates, one epoch. Then gradient descent on all
pictures of Fashion-MNIST at once, without momentum, where whitened input needs about one step.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper.records import Records
from scripts.paper.runner import PICTURES, Find, Recipe, Run, count_steps, main
from scripts.paper.tables import DASH, format_table, show_loss, show_top1, wrap
from util.tracking.plots import plot_losses

TITLES = {"cifar10": "CIFAR-10", "fashion": "Fashion-MNIST"}
METHODS = {1: "plain", 2: "whitened channels", 3: "whitened jointly", 4: "whitened in blocks of 32"}
CASES = (  # pictures, network, loss
    ("cifar10", "simple_v1", "L2"),
    ("cifar10", "simple_v1", "CE"),
    ("fashion", "simple_v1", "L2"),
    ("fashion", "simple_v1", "CE"),
    ("fashion", "mlp", "CE"),
)
RATES = (1.0, 0.1, 0.01, 0.001)
BATCH = 512
LAST = 10  # points of a curve whose mean says where training has come to
# Of gradient descent on all pictures. Whitened, every direction wants a rate of 1; plain, the
# largest eigenvalue of the second moment, 431 here, allows no more than 2 / 431.
DESCENT = {1: 0.004, 3: 1.0}
DESCENT_STEPS = 20
SHOWN_STEPS = (1, 2, 3, 5, 10, 20)
SECONDS = {"cifar10": 60.0, "fashion": 40.0}
DESCENT_SECONDS = {1: 60.0, 3: 600.0}

Case = tuple[str, str, str]


def plan(find: Find) -> list[Run]:
    runs = [make_run(*choice) for choice in product(CASES, METHODS, RATES)]
    return runs + [make_descent(method) for method in DESCENT]


def make_run(case: Case, method: int, rate: float) -> Run:
    pictures, arch, loss = case
    flags = f"--arch {arch} --method {method} --loss {loss} --lr {rate:g} --wd 5e-4 --seed 0"
    flags += f" --epochs 1 --batch-size {BATCH} --print-freq 1"
    steps = count_steps(pictures, BATCH)
    return Run(name_run(case, method, rate), pictures, flags, steps, SECONDS[pictures])


def make_descent(method: int) -> Run:
    flags = f"--arch simple_v1 --method {method} --loss L2 --lr {DESCENT[method]:g} --wd 0 --seed 0"
    flags += f" --momentum 0 --lr-scheduler step --epochs {DESCENT_STEPS} --print-freq 1"
    flags += f" --batch-size {PICTURES['fashion']}"
    flags += " --eps 1e-5 --stem-iter 15" if method != 1 else ""
    name = name_descent(method)
    return Run(name, "fashion", flags, DESCENT_STEPS, DESCENT_SECONDS[method])


def name_run(case: Case, method: int, rate: float) -> str:
    return f"{'-'.join(case)}-method{method}-lr{rate:g}"


def name_descent(method: int) -> str:
    return f"fashion-descent-method{method}"


def final_loss(record: dict[str, Any] | None) -> float | None:
    """Training loss at the end; None where there is none, or training diverged."""
    if record is None or "diverged" in record:
        return None
    losses = [loss for _, loss in record["curve"][-LAST:]]
    return sum(losses) / len(losses) if None not in losses else None


def choose_rate(case: Case, method: int, records: Records) -> float | None:
    """The rate with the lowest training loss at the end; None where no run came there."""
    losses = {rate: final_loss(records.get(name_run(case, method, rate))) for rate in RATES}
    found = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(found, key=found.__getitem__) if found else None


def page(records: Records) -> str:
    header = ["pictures", "network", "loss", "method"]
    header += [f"training loss, lr {rate:g}" for rate in RATES] + ["test top-1 at the best"]
    rows = [_describe(case, method, records) for case, method in product(CASES, METHODS)]
    steps = ["method", "lr", *(f"step {step}" for step in SHOWN_STEPS)]
    text = f"""
        One epoch, batch {BATCH}, SGD with momentum .9, weight decay 5e-4, cosine, seed 0. Training
        loss is the mean over the last {LAST} points of the curve. The picture has each method at
        its best rate.
        """
    more = f"""
        Gradient descent on all {PICTURES["fashion"]:,} pictures of Fashion-MNIST at once, squared
        error, no momentum, constant rate: training loss before each step (the pictures are flipped
        at random, so each step sees others).
        """
    descent = format_table(steps, [_describe_descent(method, records) for method in DESCENT])
    return f"{wrap(text)}\n{format_table(header, rows)}\n{wrap(more)}\n{descent}"


def _describe(case: Case, method: int, records: Records) -> list[str | None]:
    cells = [_show_loss(records.get(name_run(case, method, rate))) for rate in RATES]
    best = choose_rate(case, method, records)
    top1 = None if best is None else show_top1(records, [name_run(case, method, best)])
    pictures, arch, loss = case
    return [TITLES[pictures], f"`{arch}`", loss, f"{method} {METHODS[method]}", *cells, top1]


def _show_loss(record: dict[str, Any] | None) -> str:
    loss = final_loss(record)
    if record is not None and loss is None:
        return f"diverged at step {record.get('diverged', DASH)}"
    return show_loss(loss, 3)


def _describe_descent(method: int, records: Records) -> list[str]:
    record = records.get(name_descent(method))
    losses = dict(record["curve"]) if record else {}
    cells = [show_loss(losses.get(step), 4) for step in SHOWN_STEPS]
    return [f"{method} {METHODS[method]}", f"{DESCENT[method]:g}", *cells]


def draw(records: Records, path: Path) -> None:
    """Training loss by step: a panel for each case, and one for gradient descent."""
    panels = {}
    for case in CASES:
        pictures, arch, loss = case
        lines = {}
        for method, text in METHODS.items():
            rate = choose_rate(case, method, records)
            if rate is not None:
                curve = records[name_run(case, method, rate)]["curve"]
                lines[f"{method} {text}, lr {rate:g}"] = curve
        panels[f"{TITLES[pictures]}, {arch}, {loss}, batch {BATCH}"] = lines
    names = {method: name_descent(method) for method in DESCENT}
    panels["Fashion-MNIST, L2, all pictures at once"] = {
        f"{method} {METHODS[method]}, lr {DESCENT[method]:g}": records[name]["curve"]
        for method, name in names.items()
        if name in records
    }
    plot_losses(panels, path)


RECIPE = Recipe("regression", "Linear and logistic regression", plan, page, draw)

if __name__ == "__main__":
    main(RECIPE)
