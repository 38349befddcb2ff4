"""Table 1 of the paper: ten networks after one epoch of CIFAR-10, and VGG-11 after twenty.

    python scripts/paper/table1.py --cifar10 DIR --dry-run
    python scripts/paper/table1.py --cifar10 DIR --jobs 2

`--preset paper` and the published root, for BatchNorm and for deconvolution. Three seeds for VGG-16
and ResNet-18, one for the others; DenseNet-121 and DPN-92 stop after the first half of the epoch,
to which the schedule is fitted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper.costs import estimate
from scripts.paper.records import Records, top1_of
from scripts.paper.runner import Find, Recipe, Run, count_steps, main
from scripts.paper.tables import format_table, mean_top1, show_seconds, show_top1, wrap

HERE = Path(__file__).parent
PUBLISHED = json.loads((HERE / "published.json").read_text())
GAPS = json.loads((HERE / "gaps.json").read_text())  # reasons for wide gaps, by network
NETWORKS = PUBLISHED["networks"]
SEEDS = {"vgg16": (0, 1, 2), "resnet18": (0, 1, 2)}
HALVED = ("densenet121", "dpn")
FLAGS = {"bn": "--deconv False", "deconv": "--deconv True --root newton"}
KINDS = tuple(FLAGS)
SOURCES = ("paper", "reproduced", "here")
COLUMNS = [f"{kind}: {of}" for kind in ("BatchNorm", "deconvolution") for of in SOURCES]
BATCH, LONG = 128, 20  # pictures of a step; epochs of VGG-11
STEPS = count_steps("cifar10", BATCH)
TOLERANCE = 2.0  # points of top-1; a wider gap to the paper wants a reason


def plan(find: Find) -> list[Run]:
    runs = [
        make_run(arch, kind, seed, STEPS // 2 if arch in HALVED else STEPS)
        for arch in NETWORKS
        for seed in SEEDS.get(arch, (0,))
        for kind in KINDS
    ]
    runs.sort(key=lambda run: run.seconds)
    return runs + [make_run("vgg11", kind, 0, LONG * STEPS) for kind in KINDS]


def make_run(arch: str, kind: str, seed: int, steps: int) -> Run:
    epochs = -(-steps // STEPS)
    flags = f"--preset paper --arch {arch} {FLAGS[kind]} --seed {seed}"
    flags += f" --epochs {epochs}" + (f" --max-steps {steps}" if steps % STEPS else "")
    seconds = estimate(arch, kind == "deconv", steps, BATCH, tests=epochs)
    return Run(name_run(arch, kind, seed), "cifar10", flags, steps, seconds)


def name_run(arch: str, kind: str, seed: int) -> str:
    return f"{arch}-{kind}-seed{seed}"


def name_runs(arch: str, kind: str) -> list[str]:
    return [name_run(arch, kind, seed) for seed in SEEDS.get(arch, (0,))]


def page(records: Records) -> str:
    return "\n".join(
        [_describe_first_epoch(records), *_list_differences(), _describe_long(records)]
    )


def _describe_first_epoch(records: Records) -> str:
    header = ["network", "million parameters", *COLUMNS, "seconds of training, both"]
    header.append(f"gap to the paper of more than {TOLERANCE:g} points")
    rows = [_describe_network(arch, records) for arch in NETWORKS]
    text = f"""
        CIFAR-10, test top-1 in percent after one epoch, settings of `--preset paper --root newton`
        for both kinds: batch {BATCH}, SGD .1 with momentum .9, weight decay 1e-3, cosine over the
        epoch, blocks of 64, eps 1e-5, 5 Newton-Schulz steps, 15 in the first layer, 3 in the
        grouped convolutions of ResNeXt, 1 in the depthwise and the last convolution of a block of
        MobileNet v2 and EfficientNet, all patches that the stride leaves, last layer 512.
        *Paper*: {PUBLISHED["sources"]["paper"]}. *Reproduced*:
        {PUBLISHED["sources"]["reproduced"]}. Three seeds of VGG-16 and ResNet-18, one of the
        others; ½: DenseNet-121 and DPN-92 had the first half of the epoch alone, their schedule
        fitted to it. BatchNorm has the rate of deconvolution here, not its own best one: see *Best
        rates* below. Seconds compare where a machine did nothing else.
        """
    return f"{wrap(text)}\n{format_table(header, rows)}"


def _describe_network(arch: str, records: Records) -> list[str | None]:
    known, cells = NETWORKS[arch], []
    for index, kind in enumerate(KINDS):
        cells += [f"{known[source]['1'][index]:.2f}" for source in ("paper", "reproduced")]
        half = "½ " if arch in HALVED and mean_top1(records, name_runs(arch, kind)) else ""
        cells.append(half + show_top1(records, name_runs(arch, kind)))
    seconds = [show_seconds(records, name_runs(arch, kind)) for kind in KINDS]
    title, millions = f"{known['title']} (`{arch}`)", f"{known['millions']:.2f}"
    return [title, millions, *cells, ", ".join(seconds), explain_gap(arch, records)]


def cut(records: Records) -> str:
    """The table in short, with means alone."""
    rows = []
    for arch, known in NETWORKS.items():
        cells = []
        for index, kind in enumerate(KINDS):
            cells += [f"{known[source]['1'][index]:.1f}" for source in ("paper", "reproduced")]
            names = name_runs(arch, kind)
            whole = all(top1_of(records.get(name)) is not None for name in names)
            ours = mean_top1(records, names) if whole else None
            half = "½ " if arch in HALVED else ""
            cells.append(None if ours is None else f"{half}**{ours:.1f}**")
        rows.append([known["title"], *cells])
    return format_table(["network", *COLUMNS], rows)


def explain_gap(arch: str, records: Records) -> str | None:
    """How far our means are from the paper's, where that is far, and why; None where none is."""
    gaps = []
    for index, kind in enumerate(KINDS):
        ours = mean_top1(records, name_runs(arch, kind))
        gap = 0.0 if ours is None else ours - NETWORKS[arch]["paper"]["1"][index]
        if abs(gap) > TOLERANCE:
            gaps.append(f"{kind} {gap:+.1f}")
    if not gaps:
        return None
    return f"{', '.join(gaps)}: {GAPS.get(arch, 'not explained yet')}"


def _list_differences() -> list[str]:
    """What the published code does otherwise, which may be where a gap comes from."""
    lines = [f"Where {PUBLISHED['sources']['code']}, differs from what is built here:\n"]
    for arch, text in PUBLISHED["differences"].items():
        name = NETWORKS[arch]["title"] if arch in NETWORKS else "All but VGG and EfficientNet"
        lines.append(f"- {name}: it {text}.")
    return [*lines, ""]


def _describe_long(records: Records) -> str:
    header = ["network", *COLUMNS, "seconds of training, both"]
    rows = []
    for arch in ("vgg16", "resnet18"):
        known = [NETWORKS[arch][source][str(LONG)] for source in ("paper", "reproduced")]
        cells = [[f"{value[index]:.2f}" for value in known] + [None] for index in range(2)]
        rows.append([NETWORKS[arch]["title"], *cells[0], *cells[1], None])
    ours = [show_top1(records, [name_run("vgg11", kind, 0)]) for kind in KINDS]
    seconds = [show_seconds(records, [name_run("vgg11", kind, 0)]) for kind in KINDS]
    rows.append(["VGG-11", None, None, ours[0], None, None, ours[1], ", ".join(seconds)])
    text = (
        f"After {LONG} epochs, the same settings. VGG-11 was not published; the nearest that were:"
    )
    return f"{text}\n\n{format_table(header, rows)}"


RECIPE = Recipe("table1", "Table 1 of the paper, after one epoch", plan, page)

if __name__ == "__main__":
    main(RECIPE)
