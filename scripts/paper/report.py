"""Gather the finished runs of scripts/paper/ into results/, and write docs/results.md from them.

    python scripts/paper/report.py                # runs/paper -> results/*.json, docs/results.md
    python scripts/paper/report.py --runs DIR     # runs in another folder

Records of runs outside --runs are kept, so several machines can contribute. The page, its plots and
the table in README.md depend on results/ alone.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.paper import batch_size, best_rates, filters, modes, regression, rivals, table1
from scripts.paper.records import RESULTS, ROOT, Records, load, save, top1_of
from scripts.paper.runner import RUNS, gather
from scripts.paper.tables import KINDS, format_table, mean_top1, show_loss, show_seconds, show_top1
from util.cli.parser import Parser, path_name
from util.files import atomic_write

RECIPES = tuple(
    module.RECIPE for module in (table1, best_rates, modes, regression, filters, batch_size, rivals)
)
PAGE, README = "results.md", "README.md"
TEMPLATE = Path(__file__).with_name("results_template.md")
MARKS = "<!-- by scripts/paper/report.py -->\n", "<!-- end -->\n"  # around README's table
README_NETWORKS = ("vgg16", "resnet18", "mobilev2")  # rows of README's table


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("report.py", __doc__.splitlines()[0])
    add = parser.add_group("folders")
    add("--runs", "runs of the recipes", path_name, str(RUNS), "runs/paper", metavar="DIR")
    add("--results", "records", path_name, str(RESULTS), "results", metavar="DIR")
    add("--docs", "page and plots", path_name, str(ROOT / "docs"), "docs", metavar="DIR")
    flags = parser.parse_args(argv)
    results, docs = Path(flags.results), Path(flags.docs)
    for folder in (results, docs):
        folder.mkdir(parents=True, exist_ok=True)
    for recipe in RECIPES:
        known = load(recipe.name, results)
        if records := gather(recipe, Path(flags.runs) / recipe.name, known):
            save(recipe.name, known | records, results)
            print(f"{len(records)} runs in {results / recipe.name}.json")
    write_page(results, docs)
    print(f"wrote {docs / PAGE}")
    write_readme_table(results, docs.parent / README)


def write_readme_table(results: Path, readme: Path) -> None:
    """Write the short table between the marks in a README; skip a README without both marks."""
    text = readme.read_text() if readme.exists() else ""
    before, begin, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (begin and end):
        print(f"skipped {readme}: no lines {MARKS[0].strip()} and {MARKS[1].strip()}")
        return
    with atomic_write(readme) as file:
        file.write(f"{before}{begin}\n{format_readme_table(results)}\n{end}{after}".encode())


def format_readme_table(results: Path) -> str:
    """Return five rows: networks at the paper's learning rate, and each kind at its own best."""
    paper, best = load("table1", results), load("best_rates", results)
    header = ["top-1 (%)"]
    header += [f"{kind}: {source}" for kind in KINDS.values() for source in ("paper", "here")]
    rows = []
    for arch in README_NETWORKS:
        network, cells = table1.NETWORKS[arch], []
        for index, kind in enumerate(KINDS):
            published = f"{network['paper']['1'][index]:.1f}"
            cells += [published, _show_mean(paper, table1.name_runs(arch, kind))]
        rows.append([network["title"], *cells])
        if arch in best_rates.NETWORKS:
            names = [best_rates.find_best(arch, kind, best)[1] for kind in KINDS]
            cells = [cell for runs in names for cell in (None, _show_mean(best, runs))]
            rows.append([f"{network['title']}, each kind at its own best rate", *cells])
    return format_table(header, rows)


def _show_mean(records: Records, names: Sequence[str]) -> str | None:
    """Return the mean test top-1, None unless every run has finished."""
    complete = names and all(top1_of(records.get(name)) is not None for name in names)
    return f"{mean_top1(records, names):.1f}" if complete else None


def write_page(results: Path, docs: Path) -> None:
    """Fill the template of the page from the records, and draw its plots."""
    values = {}
    for recipe in RECIPES:
        records = load(recipe.name, results)
        parts = {**recipe.format(records), "runs": describe_runs(records)}
        values |= {f"{recipe.name}_{part}": text.rstrip() for part, text in parts.items()}
        if recipe.draw and records:
            recipe.draw(records, docs / f"results_{recipe.name}.png")
    page = Template(TEMPLATE.read_text("utf-8")).substitute(values).rstrip()
    with atomic_write(docs / PAGE) as file:
        file.write(f"{page}\n".encode())


def describe_runs(records: Records) -> str:
    """Return the machines and the runs of a recipe, empty without a run."""
    return f"{describe_machines(records)}\n{list_runs(records)}" if records else ""


def describe_machines(records: Records) -> str:
    """Return the number of runs per machine, and the total training time."""
    machines = Counter(
        f"{record['processor']} ({record['device']}), torch {record['versions']['torch']}"
        for record in records.values()
    )
    seconds = sum(record.get("train_seconds") or 0 for record in records.values())
    counts = "; ".join(f"{count} on {machine}" for machine, count in sorted(machines.items()))
    return f"Runs: {counts}. Total training time: {seconds / 3600:.1f} hours.\n"


def list_runs(records: Records) -> str:
    """Return a collapsed table of all runs."""
    header = ["run", "seed", "lr", "weight decay", "batch size", "steps", "training loss"]
    header += ["test top-1 (%)", "training (s)", "device", "commit"]
    rows = [describe_run(name, record) for name, record in sorted(records.items())]
    title = f"<details><summary>Runs ({len(rows)})</summary>"
    return f"{title}\n\n{format_table(header, rows)}\n</details>\n"


def describe_run(name: str, record: dict[str, Any]) -> list[Any]:
    """Return the row of a run."""
    flags = [record["flags"][key] for key in ("seed", "lr", "weight_decay", "batch_size")]
    if "diverged" in record:
        results = [f"diverged at {record['diverged']}", None, None, None]
    else:
        results = [record["steps"], show_loss(record["train_loss"], 4)]
        results += [show_top1({name: record}, [name]), show_seconds({name: record}, [name])]
    return [name, *flags, *results, record["device"], (record["commit"] or "-")[:9]]


if __name__ == "__main__":
    main()
