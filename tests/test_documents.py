"""Documents and docstrings: commands parse, paths exist, tables are whole, every place is named."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import deconv
import main
import main_imagenet
from deconv.conv import MODES, FastDeconv
from scripts.paper import modes as modes_recipe
from tests.commands import find_commands, read_flags

ROOT = Path(__file__).resolve().parents[1]
README, GUIDE = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
METHOD, RELIABILITY = ROOT / "docs" / "method.md", ROOT / "docs" / "reliability.md"
PAGES = [README, GUIDE, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = sorted((ROOT / "scripts").rglob("*.sh"))
ROOMS = ("deconv", "models", "util", "scripts", "tests", "docs", "results")
PRODUCT = [
    *ROOT.glob("*.py"),
    *(path for room in ROOMS[:4] for path in (ROOT / room).rglob("*.py")),
]
VAGUE = {"What", "How", "Whether", "Where", "Of", "All", "Those", "That", "As"}


def name(path):
    return str(path.relative_to(ROOT))


def read(path):
    return path.read_text(encoding="utf-8")


def find_tables(text):
    """Yield the rows of each Markdown table, as lists of cells."""
    rows = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            yield rows
            rows = []


def test_the_readme_is_short():
    lines = read(README).splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("path", [*PAGES, *SHELL], ids=name)
def test_every_command_is_accepted(path):
    for script, argv in find_commands(path):
        if "help" not in argv[-1]:
            read_flags(argv, script)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_path_exists_and_every_table_is_whole(path):
    text = read(path)
    # Scripts that are run, files that are named, and targets of links.
    places = re.findall(r"(?:python|bash|sbatch(?: -\S+)*) ([\w/.]+\.(?:py|sh))\b", text)
    places += re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w/.]+\.\w+)[`:]", text)
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    missing = [place for place in places if "NAME" not in place and not (ROOT / place).exists()]
    assert missing + [link for link in links if not (path.parent / link).exists()] == []
    for table in find_tables(text):
        assert all(table[0]), table[0]
        assert {len(row) for row in table} == {len(table[0])}, table[0]
        assert [row for row in table if not all(row)] == []  # no ditto by a blank cell


def test_every_equation_is_where_the_page_says():
    (table,) = [rows for rows in find_tables(read(METHOD)) if rows[0][0] == "equation"]
    for _, file, names in table[2:]:
        code = read(ROOT / file.strip("`"))
        for found in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^ *(def|class) {found}\b|^{found}\b", code, re.MULTILINE), found


def test_every_promise_names_a_test():
    for file, words in re.findall(r"`(test_\w+\.py)(?:: (\w+))?`", read(RELIABILITY)):
        code = "".join(read(path) for path in (ROOT / "tests").rglob(file))
        assert re.search(rf"def test_\w*{words}", code), f"{file}: {words}"


def test_every_document_names_the_version_of_the_package():
    released = re.findall(r"^## (\d\S*)", read(ROOT / "CHANGELOG.md"), re.MULTILINE)
    cited = re.findall(r"^version: (\S+)", read(ROOT / "CITATION.cff"), re.MULTILINE)
    assert [*released[:1], *cited] == [deconv.__version__] * 2


def list_file_tree():
    """Return the paths that the file tree of CONTRIBUTING.md names."""
    tree = read(GUIDE).partition("## Files")[2].partition("```\n")[2].partition("```")[0]
    named, folders = [], []
    for line in tree.splitlines():
        depth, entry = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [entry.rstrip("/")] if entry.endswith("/") else []
        named += [] if entry.endswith("/") else ["/".join([*folders, entry])]
    return named


def test_the_file_tree_names_exactly_the_files_there_are():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.check_output(command, cwd=ROOT, text=True).split()
    product = re.compile(r"(deconv|models|util|scripts|docs)/.*\.(py|sh|md)|main\w*\.py")
    files = {path for path in listed if product.fullmatch(path) and (ROOT / path).exists()}
    files = {path for path in files if not path.endswith("__init__.py")}
    named = list_file_tree()
    assert len(named) == len(set(named))
    faults = [f"CONTRIBUTING.md, Files: add a line for {path}" for path in files - set(named)]
    faults += [f"CONTRIBUTING.md, Files: remove the line of {path}" for path in set(named) - files]
    if faults:
        pytest.fail("\n".join(sorted(faults)), pytrace=False)


def test_docstrings_begin_with_a_verb_or_a_noun():
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    vague = []
    for path in PRODUCT:
        for node in ast.walk(ast.parse(read(path))):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and text.split()[0] in VAGUE:
                vague.append(f"{name(path)}: {text.splitlines()[0]}")
    assert vague == []


def accepts(parser, mode):
    try:
        return str(parser.parse_args(["--deconv", "True", "--mode", mode]).mode) == mode
    except SystemExit:
        return False


def test_a_mode_is_named_in_every_place():
    """A new `--mode` has to be added in all of these places; see CONTRIBUTING.md."""
    known = {str(mode) for mode in MODES}
    tables = list(find_tables(read(METHOD)))
    tables = [{row[0] for row in rows[2:]} for rows in tables if rows[0][0] == "`--mode`"]
    argument = re.search(r"\bmode: (.*?)\n +[a-z]\w*:", FastDeconv.__doc__, re.DOTALL)[1]
    places = {
        "scripts/paper/modes.py: MODES": {str(mode) for mode in modes_recipe.MODES},
        "docs/method.md, Modes: first table": tables[0],
        "docs/method.md, Modes: second table": tables[1],
        "deconv/conv.py: FastDeconv, Args, mode": set(re.findall(r"\b\d\b", argument)),
    }
    for script in (main, main_imagenet):
        parser = script.build_script().parser
        (flag,) = [action for action in parser._actions if action.dest == "mode"]
        accepted = {mode for mode in known if accepts(parser, mode)}
        places[f"util/cli/flags.py: type of --mode ({script.__name__}.py)"] = accepted
        places["util/cli/flags.py: help of --mode"] = set(re.findall(r"\b\d\b", flag.help))
    assert [place for place, found in places.items() if not known <= found] == []
