"""Gather finished runs of scripts/paper/ into results/, and write docs/results.md from there.

    python scripts/paper/report.py                # runs/paper -> results/*.json, docs/results.md
    python scripts/paper/report.py --runs DIR     # runs that lie elsewhere

Runs that are not in --runs keep their records, so those of several machines come together. The
page, its pictures and the table in README.md beside docs/ follow from results/ alone.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper import batch_size, best_rates, filters, modes, regression, table1
from scripts.paper.records import RESULTS, ROOT, Records, load, save
from scripts.paper.runner import RUNS, Recipe, gather
from scripts.paper.tables import format_table, show_loss
from util.cli.parser import Parser, path_name
from util.files import atomic_write

RECIPES = tuple(m.RECIPE for m in (table1, best_rates, modes, regression, filters, batch_size))
PAGE, README = "results.md", "README.md"
MARKS = "<!-- by scripts/paper/report.py -->\n", "<!-- to here -->\n"  # around README's table
INTRO = """\
# Results

Written by `python scripts/paper/report.py` from the records in `results/`: every accuracy measured
here is of a run whose settings, seed, machine, versions and commit are there. Each section is one
recipe; with `--dry-run` it says what it would run, and how long that takes. A dash: not run yet.
Accuracy is test top-1 in percent after the last epoch, not the best. CIFAR-10 is its 60,000
pictures as JPEG files where a record's `dataset` is `folder`, its binary files where it is
`cifar10`.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("paper_report.py", __doc__.splitlines()[0])
    add = parser.add_group("folders")
    add("--runs", "of the recipes' runs", path_name, str(RUNS), "runs/paper", metavar="DIR")
    add("--results", "of the records", path_name, str(RESULTS), "results", metavar="DIR")
    add(
        "--docs",
        "of the page and its pictures",
        path_name,
        str(ROOT / "docs"),
        "docs",
        metavar="DIR",
    )
    flags = parser.parse_args(argv)
    results, docs = Path(flags.results), Path(flags.docs)
    for folder in (results, docs):
        folder.mkdir(parents=True, exist_ok=True)
    for recipe in RECIPES:
        known = load(recipe.name, results)
        if found := gather(recipe, Path(flags.runs) / recipe.name, known):
            save(recipe.name, known | found, results)
            print(f"{len(found)} runs in {results / recipe.name}.json")
    write_page(results, docs)
    print(f"written: {docs / PAGE}")
    write_cut(results, docs.parent / README)


def write_cut(results: Path, readme: Path) -> None:
    """Table 1 in short, between the marks in a README; nothing where there is none.

    Raises:
        SystemExit: the marks are not there, in this order; nothing is written.
    """
    if not readme.exists():
        return
    before, begin, rest = readme.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (begin and end):
        raise SystemExit(
            f"{readme}: no lines {MARKS[0].strip()} and {MARKS[1].strip()} for Table 1"
        )
    with atomic_write(readme) as file:
        file.write(f"{before}{begin}\n{table1.cut(load('table1', results))}\n{end}{after}".encode())


def write_page(results: Path, docs: Path) -> None:
    """The page and its pictures, from the records alone."""
    parts = [INTRO]
    for recipe in RECIPES:
        records = load(recipe.name, results)
        parts.append(format_section(recipe, records))
        if recipe.draw and records:
            recipe.draw(records, docs / name_picture(recipe))
    with atomic_write(docs / PAGE) as file:
        file.write("\n".join(parts).encode())


def name_picture(recipe: Recipe) -> str:
    return f"results_{recipe.name}.png"


def format_section(recipe: Recipe, records: Records) -> str:
    pictures = {run.pictures for run in recipe.plan(lambda name: 0.0)}
    where = " --cifar10 DIR" if "cifar10" in pictures else ""
    command = f"python scripts/paper/{recipe.name}.py{where}"
    parts = [f"## {recipe.title}\n", f"```sh\n{command}\n```\n"]
    parts.append(recipe.page(records))
    if recipe.draw and records:
        parts.append(f"![{recipe.title}]({name_picture(recipe)})\n")
    if records:
        parts += [describe_runs(records), list_runs(records)]
    return "\n".join(parts)


def describe_runs(records: Records) -> str:
    """Where the runs were made, and how long they took."""
    machines = Counter(describe_machine(record) for record in records.values())
    seconds = sum(record.get("train_seconds") or 0 for record in records.values())
    places = "; ".join(f"{count} on {machine}" for machine, count in sorted(machines.items()))
    return f"Runs: {places}. {seconds / 3600:.1f} hours of training in all.\n"


def describe_machine(record: dict[str, Any]) -> str:
    versions = record["versions"]
    return f"{record['processor']} ({record['device']}), torch {versions['torch']}"


def list_runs(records: Records) -> str:
    """Every run, folded away."""
    header = ["run", "seed", "lr", "weight decay", "batch", "steps", "training loss"]
    header += ["test top-1", "seconds of training", "device", "commit"]
    rows = [describe_run(name, record) for name, record in sorted(records.items())]
    title = f"<details><summary>All {len(rows)} runs</summary>"
    return f"{title}\n\n{format_table(header, rows)}\n</details>\n"


def describe_run(name: str, record: dict[str, Any]) -> list[Any]:
    made = [record["flags"][key] for key in ("seed", "lr", "weight_decay", "batch_size")]
    where = [record["device"], (record["commit"] or "-")[:9]]
    if "diverged" in record:
        return [name, *made, f"diverged at {record['diverged']}", None, None, None, *where]
    loss = show_loss(record["train_loss"], 4)
    figures = [format_figure(record[key], form) for key, form in FORMS.items()]
    return [name, *made, record["steps"], loss, *figures, *where]


FORMS = {"test_top1": ".2f", "train_seconds": ",.0f"}


def format_figure(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


if __name__ == "__main__":
    main()
