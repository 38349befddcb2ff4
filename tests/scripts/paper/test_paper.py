"""Recipes of scripts/paper/: planned runs, execution, records and the report."""

import json
import os
import signal
import sys
import threading
import time

import pytest
import torch

from scripts import trained_network
from scripts.paper import best_rates, filters, records, regression, report, runner, table1
from scripts.paper.runner import Recipe, Run, make_command, make_parser
from util.cli.settings import read_settings

METRICS = {"test_top1": 50.0, "steps": 3}
WAIT_SECONDS = 60  # for a child process, on a busy machine


def by_name(recipe):
    return pytest.param(recipe, id=recipe.name)


by_recipe = pytest.mark.parametrize("recipe", [*map(by_name, report.RECIPES)])


@by_recipe
def test_main_accepts_every_run_and_ends_where_the_recipe_says(recipe, tmp_path):
    flags, passed = make_parser(recipe).parse_known_args(["--cifar10", "DIR", "--amp", "bf16"])
    runs = recipe.plan(lambda name: 0.0)
    (program,) = {run.program for run in runs}
    script = program.build_script()
    assert len({run.name for run in runs}) == len(runs) > 0
    for run in runs:
        words = make_command(run, tmp_path / run.name, flags, passed)
        read = read_settings(script, words[2:])[0]
        steps = read.epochs * runner.count_steps(run.dataset, read.batch_size)
        assert run.steps == min(read.max_steps or steps, steps), run.name
        assert read.dataset == {"cifar10": "folder"}.get(run.dataset, run.dataset)
        assert read.amp == "bf16" and run.seconds > 0
        assert run.seconds < 40 * 3600 or run.steps >= 20 * 391
        assert recipe.name == "regression" or run.gpu_seconds < run.seconds


def test_table1_has_the_ten_networks_of_the_paper_both_ways():
    runs = table1.plan(lambda name: None)
    first = [run for run in runs if run.dataset == "cifar10" and run.steps <= 391]
    assert len(table1.NETWORKS) == 10 and len(first) == 2 * (8 + 2 * 3)
    assert {run.name for run in first if run.steps != 391} == {
        f"{arch}-{kind}-seed0" for arch in ("dpn", "densenet121") for kind in ("bn", "deconv")
    }
    assert len(runs) == len(first) + 2 * (10 * 5 + 1)  # 5 other columns, and VGG-11


@pytest.mark.parametrize(
    "words, count, steps",
    [
        ([], 28, {391}),
        (["--half-epochs", "dpn"], 28, {195, 391}),
        (["--epochs", "20", "100"], 42, {7820, 39100}),
        (["--dataset", "cifar100", "--epochs", "1"], 20, {391}),
    ],
)
def test_the_flags_of_table1_select_its_columns(words, count, steps):
    flags, _ = make_parser(table1.RECIPE).parse_known_args(words)
    runs = table1.RECIPE.choose(flags)(lambda name: None)
    assert len(runs) == count and {run.steps for run in runs} == steps
    assert len({run.dataset for run in runs}) == 1


def test_the_best_rate_is_tried_at_other_decays_and_the_best_pair_with_other_seeds():
    def plan_new(**better):
        results.update({f"vgg16-bn-{name}-seed0": top1 for name, top1 in better.items()})
        runs = best_rates.plan(results.get)
        return [run for run in runs if run.name not in results]

    results = {run.name: 30.0 for run in best_rates.plan(lambda name: None)}
    assert len(results) == 2 * sum(map(len, best_rates.RATES.values()))
    results |= {name: 35.0 for name in results if "bn-lr0.01-" in name or "deconv-lr0.1-" in name}
    new = plan_new(**{"lr0.03-wd0.001": 40.0, "lr0.01-wd0.001": None})
    assert len(new) == 3 * 2 and not any("vgg16-bn" in run.name for run in new)
    new = plan_new(**{"lr0.01-wd0.001": 30.0})
    assert [run.name for run in new if "vgg16-bn" in run.name] == [
        "vgg16-bn-lr0.03-wd0.0005-seed0",
        "vgg16-bn-lr0.03-wd0.002-seed0",
    ]
    new = plan_new(**{"lr0.03-wd0.0005": 39.0, "lr0.03-wd0.002": 41.0})
    flags = [run.flags for run in new if "vgg16-bn" in run.name]
    assert [text.partition("--lr ")[2] for text in flags] == [
        f"0.03 --wd 0.002 --seed {seed} --epochs 1" for seed in (1, 2)
    ]


@pytest.mark.parametrize("best, beyond", [(0.003, 0.001), (0.1, 0.3)])
def test_rates_are_tried_until_the_best_is_between_others(best, beyond):
    def find(name):
        return results.get(float(name.partition("lr")[2].partition("-")[0]))

    results = dict.fromkeys(best_rates.RATES["bn"], 30.0) | {best: 40.0}
    unknown, _ = best_rates.search("vgg16", "bn", lambda name: 0.0)
    assert {rate for rate, _ in unknown} == set(best_rates.RATES["bn"])  # a dry run, not a search
    pairs, chosen = best_rates.search("vgg16", "bn", find)
    assert pairs[-1] == (beyond, best_rates.DECAY) and chosen is None
    results[beyond] = 35.0
    pairs, chosen = best_rates.search("vgg16", "bn", find)
    assert len(pairs) == 4 + 1 + 2 and chosen[0] == best
    results = dict.fromkeys(best_rates.SERIES, 30.0) | {best_rates.SERIES[0]: 40.0}
    _, chosen = best_rates.search("vgg16", "bn", find)
    assert chosen[0] == best_rates.SERIES[0]  # the end of the series


@pytest.fixture
def stand_in(monkeypatch):
    """Short programs in place of main.py: a dict of outcomes by name, a list of names run."""
    ends, ran = {}, []

    def command(run, folder, flags, passed):
        ran.append(run.name)
        end, text = ends.get(run.name, "summary.json"), json.dumps(METRICS | {"step": 3})
        if end == "fails":
            return [sys.executable, "-c", "print('no luck\\n'); raise SystemExit(2)"]
        return [sys.executable, "-c", f"open({str(folder / end)!r}, 'w').write({text!r})"]

    monkeypatch.setattr(runner, "make_command", command)
    return ends, ran


def make_recipe(*names, later=(), **kwargs):
    def plan(find):
        known = names if None in map(find, names) else (*names, *later)
        return [Run(name, "fashion", "", 3, 1.0) for name in known]

    return Recipe("tiny", "Tiny", plan, format=lambda records: {}, **kwargs)


def test_runs_are_made_once_and_one_that_fails_does_not_stop_the_others(stand_in, tmp_path, capsys):
    ends, ran = stand_in
    ends |= {"b": "fails", "c": "diverged.json"}
    recipe, argv = make_recipe("a", "b", "c"), ["--out", str(tmp_path), "--jobs", "2"]
    with pytest.raises(SystemExit, match=r"tiny: not finished, see console.txt in .*: b$"):
        runner.main(recipe, argv)
    assert ran == ["a", "b", "c"]
    output = capsys.readouterr().out
    for text in ("a: test top-1 50.00 %", "b: failed with code 2: no luck", "c: diverged"):
        assert text in output
    ends["b"] = "summary.json"
    runner.main(recipe, argv)
    runner.main(recipe, argv)
    assert ran == ["a", "b", "c", "b"]


@pytest.mark.parametrize(
    "words, error",
    [
        (["--seed", "5"], "--seed is not passed on"),
        (["--mode", "5"], "--mode is not passed on"),
        (["--run-dir", "x"], "--run-dir is not passed on"),
        (["--job", "2"], "unrecognized arguments: --job"),
        (["--only", "z"], "--only z matches no run"),
        (["--cifar10", "/nowhere"], "--cifar10 /nowhere has no folder train/"),
    ],
)
def test_flags_that_the_recipe_sets_or_nobody_knows_are_refused(
    words, error, stand_in, tmp_path, capsys
):
    plan = [Run("a", "fashion", "--seed 0", 3, 1.0), Run("b", "fashion", "--mode 3", 3, 1.0)]
    recipe = Recipe("tiny", "Tiny", lambda find: plan, format=lambda records: {})
    with pytest.raises(SystemExit, match="2"):
        runner.main(recipe, ["--out", str(tmp_path), *words])
    assert error in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_run_made_with_other_flags_is_not_taken_for_the_recipes(tmp_path, monkeypatch):
    run = Run("a", "fashion", "--seed 1 --wd 5e-4 --epochs 1", 3, 1.0)
    made = {"seed": 1, "weight_decay": 5e-4, "epochs": 9, "mode": 3}  # the recipe leaves mode open
    known = {"a": {"steps": 3, "flags": made}}
    assert runner.find_state(run, tmp_path / "a", known) == "recorded"
    made["weight_decay"] = 1e-3
    with pytest.raises(SystemExit, match=r"--wd 0.001, the recipe's a has 0.0005"):
        runner.find_state(run, tmp_path / "a", known)
    (tmp_path / "args.json").write_text(json.dumps({"flags": made}))
    with pytest.raises(SystemExit, match=f"{tmp_path} was made with --wd 0.001"):
        runner.find_state(run, tmp_path)


@by_recipe
def test_the_committed_records_were_made_as_the_recipes_say(recipe):
    results = records.load(recipe.name)
    for run in runner.list_runs(recipe, runner.ROOT / "nowhere", "", results):
        runner.find_state(run, runner.ROOT / "nowhere" / run.name, results)


@pytest.mark.parametrize("text", ["", '{"steps": 3', "[]"])
def test_files_of_runs_that_cannot_be_read_are_named(text, tmp_path):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(SystemExit, match=f"{tmp_path}/summary.json"):
        runner.find_state(Run("a", "fashion", "", 3, 1.0), tmp_path)


def test_runs_that_depend_on_results_come_after_them(stand_in, tmp_path):
    _, ran = stand_in
    runner.main(make_recipe("a", "b", later=["best"]), ["--out", str(tmp_path)])
    assert ran == ["a", "b", "best"]


def test_runs_recorded_elsewhere_are_left_out_and_later_ones_follow_from_them(
    stand_in, tmp_path, monkeypatch, capsys
):
    drawn, ran = [], stand_in[1]
    recipe = make_recipe(
        "a", "b", later=["best"], follow_up=lambda *paths: drawn.append(paths) or []
    )
    argv = ["--out", str(tmp_path / "runs")]
    results = {"a": {"test_top1": 40.0, "steps": 3}, "b": {"diverged": 3, "test_top1": 70.0}}
    monkeypatch.setattr(runner, "load", lambda name, folder: results)
    runner.main(recipe, [*argv, "--skip-recorded", "--dry-run"])
    states = [line[:8] for line in capsys.readouterr().out.splitlines()]
    assert states[:3] == ["recorded", "recorded", "to do   "]
    ran.clear()
    runner.main(recipe, [*argv, "--skip-recorded"])
    assert ran == ["best"] and not drawn  # the follow-up needs every run on this machine
    folder, longer = tmp_path / "runs" / "tiny", {"a": {"test_top1": 40.0, "steps": 1}}
    for known in ({}, longer):  # and records of shorter runs do not count
        assert [run.name for run in runner.list_unfinished(recipe, folder, "", known)] == [
            "a",
            "b",
        ]
    runner.main(recipe, argv)
    assert ran == ["best", "a", "b"] and len(drawn) == 1
    runner.main(recipe, [*argv, "--skip-recorded"])
    assert ran == ["best", "a", "b"] and len(drawn) == 2


def test_results_recorded_elsewhere_enter_the_plan():
    seen = []
    recipe = Recipe("tiny", "Tiny", lambda find: seen.append([*map(find, "abc")]) or [], str)
    known = {"a": {"test_top1": 40.0}, "b": {"diverged": 3, "test_top1": 70.0}}
    runner.list_runs(recipe, runner.ROOT / "nowhere", "", known)
    assert seen == [[40.0, 0.0, None]]


@pytest.mark.parametrize("text", ['{"a": ', "null"])
def test_records_that_cannot_be_read_are_named(text, tmp_path):
    (tmp_path / "tiny.json").write_text(text)
    with pytest.raises(SystemExit, match=r"tiny.json (is not JSON|does not hold a JSON object)"):
        records.load("tiny", tmp_path)


def test_the_follow_up_command_finds_the_images(stand_in, tmp_path):
    def draw(folder, cifar10):
        words = filters.list_plot_commands(folder, cifar10)[0][1:]
        return [[sys.executable, "-c", f"open({str(drawn)!r}, 'w').write({' '.join(words)!r})"]]

    drawn = tmp_path / "drawn"
    argv = ["--out", str(tmp_path), "--cifar10", str(tmp_path / "images")]
    (tmp_path / "images" / "train").mkdir(parents=True)
    runner.main(make_recipe("a", follow_up=draw), argv)
    parser = trained_network.make_parser("inspect_layers.py", "", "", 1, "")
    read = parser.parse_args(drawn.read_text().split()[1:])
    assert read.checkpoint == str(tmp_path / "tiny" / filters.NAME / "checkpoint.pth.tar")
    assert read.data == str(tmp_path / "images") and read.out.parent.name == "docs"


def test_a_dry_run_only_lists_the_runs(tmp_path, capsys):
    recipe, folder = make_recipe("a", "b", later=["best"]), tmp_path / "tiny"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "summary.json").write_text(json.dumps(METRICS))
    runner.main(recipe, ["--out", str(tmp_path), "--dry-run", "--jobs", "2"])
    first, second, third, last = capsys.readouterr().out.splitlines()
    assert first.startswith("finished") and "python main.py" in first
    assert second.startswith("to do") and "--resume auto" in second and third.startswith("to do")
    assert last == "about 0.0 hours to go, 2 at a time, on an idle CPU core each"
    runner.main(recipe, ["--out", str(tmp_path), "--dry-run", "--gpus", "0"])
    assert capsys.readouterr().out.endswith("each, without 2 runs of unknown duration\n")
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_each_run_of_gpus_sees_one_of_them_and_a_free_one_takes_the_next(
    tmp_path, monkeypatch, capsys
):
    code = (
        "import json, os, time; from pathlib import Path; here = Path({folder!r})\n"
        "gpu = os.environ['CUDA_VISIBLE_DEVICES']; busy = here.parent / f'busy-{{gpu}}'\n"
        "busy.touch(exist_ok=False); time.sleep(0.2); busy.unlink()\n"
        "(here / 'summary.json').write_text(json.dumps({{'test_top1': 1.0, 'steps': 3}}))\n"
        "(here / 'gpu').write_text(gpu)"
    )
    command = lambda run, folder, *more: [sys.executable, "-c", code.format(folder=str(folder))]
    monkeypatch.setattr(runner, "make_command", command)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7")
    recipe, argv = make_recipe(*"abcd"), ["--out", str(tmp_path), "--gpus", "1-2"]
    runner.main(recipe, argv)
    used = {name: (tmp_path / "tiny" / name / "gpu").read_text() for name in "abcd"}
    assert (used["a"], used["b"]) == ("6", "7") and {used["c"], used["d"]} <= {"6", "7"}
    capsys.readouterr()
    for words, error in (("0,3", "5,6,7 has fewer GPUs"), ("2-1", "empty range"), ("x", "ranges")):
        with pytest.raises(SystemExit, match="2"):
            runner.main(recipe, ["--out", str(tmp_path), "--gpus", words])
        assert error in capsys.readouterr().err


def test_a_longer_run_is_taken_up_again(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(METRICS))
    assert runner.find_state(Run("a", "fashion", "", 3, 1.0), tmp_path) == "finished"
    assert runner.find_state(Run("a", "fashion", "", 60, 1.0), tmp_path) == "begun"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_runs_which_may_save(number, tmp_path, monkeypatch):
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    code = (
        "import signal, time; from pathlib import Path\n"
        f"signal.signal(signal.SIGTERM, lambda *_: Path({str(saved)!r}).touch())\n"
        f"Path({str(ready)!r}).touch()\n"
        f"end = time.monotonic() + {WAIT_SECONDS}\n"
        f"while not Path({str(saved)!r}).exists() and time.monotonic() < end: time.sleep(0.05)\n"
    )
    children, start = [], runner.start
    command = lambda run, *more: [sys.executable, "-c", code if run.name == "a" else ""]

    def start_child(line, folder, gpu):
        children.append(start(line, folder, gpu))
        return children[-1]

    def send():
        end = time.monotonic() + WAIT_SECONDS
        while not ready.exists() and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(runner, "start", start_child)
    monkeypatch.setattr(runner, "make_command", command)
    thread = threading.Thread(target=send, daemon=True)
    # A signal that arrives early or late must not end pytest itself.
    before = signal.signal(number, lambda *_: None)
    try:
        thread.start()
        with pytest.raises(SystemExit) as end:
            runner.main(make_recipe("a", "b"), ["--out", str(tmp_path)])
        assert end.value.code == 128 + number
        assert saved.exists() and not (tmp_path / "tiny" / "b").exists()
    finally:
        thread.join(2 * WAIT_SECONDS)
        for child in children:
            child.kill()
            child.wait(WAIT_SECONDS)
        signal.signal(number, before)


def test_a_run_of_the_main_script_becomes_a_record_without_paths(image_folder, tmp_path, capsys):
    flags = "--arch simple_v1 --epochs 1 --batch-size 4 --max-steps 2 --lr .01 --print-freq 1"
    run = Run("a", "cifar10", f"{flags} --use-gpu False --save-plot False", 2, 1.0)
    recipe = Recipe("tiny", "Tiny", lambda find: [run], format=lambda records: {})
    out = tmp_path / "runs"
    runner.main(recipe, ["--cifar10", str(image_folder), "--out", str(out)])
    assert "a: test top-1" in capsys.readouterr().out
    assert not list((out / "tiny" / "a").glob("*previous*"))
    results = runner.gather(recipe, out / "tiny", {})
    records.save("tiny", results, tmp_path / "results")
    assert records.load("tiny", tmp_path / "results") == results
    (record,) = results.values()
    assert record["steps"] == 2 and record["flags"]["lr"] == 0.01
    assert [step for step, _ in record["curve"]] == [1, 2] and len(record["epochs"]) == 1
    assert record["processor"] and record["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in (tmp_path / "results" / "tiny.json").read_text()


def make_record(top1=50.0, **kwargs):
    """Return a record like those of `records.read_record`."""
    flags = {"seed": 0, "lr": 0.1, "weight_decay": 0.001, "batch_size": 128}
    machine = {"versions": {"torch": "2"}, "commit": "c" * 40, "device": "cpu", "processor": "P"}
    metrics = {"test_top1": top1, "train_seconds": 90.0, "train_loss": 1.5, "steps": 391}
    curve = [[1, 3.0], [2, 2.0], [391, 1.0]]
    return {"flags": flags, **machine, **metrics, "epochs": [], "curve": curve, **kwargs}


def test_table1_shows_means_gaps_and_dashes(monkeypatch):
    monkeypatch.setattr(table1, "GAPS", {"dpn": "half an epoch here"})
    results = {f"vgg16-deconv-seed{seed}": make_record(70.0 + seed) for seed in range(3)}
    results["resnet18-bn-seed0"] = make_record(56.0)
    results["cifar100-pnasnetA-bn-epochs20-seed0"] = make_record(44.0)
    results["resnet18-bn-seed1"] = {"diverged": 3}  # before its first epoch was over
    results["dpn-bn-seed0"] = make_record(20.0, steps=195)
    lines = "".join(table1.format_tables(results).values()).splitlines()
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in
            lines if line.startswith("| ")}  # fmt: skip
    vgg16 = rows["VGG-16 (`vgg16`)"]
    assert vgg16[:4] == ["14.71", "14.12", "14.38", "-"]
    assert vgg16[4:7] == ["74.18", "74.20", "**71.00** (70.00, 71.00, 72.00)"]
    assert vgg16[7:] == ["-", "90", "deconvolution -3.2: not explained yet"]
    assert (
        rows["ResNet-18 (`resnet18`)"][3] == "**56.00** (56.00, diverged at step 3)"
        and rows["ResNet-18 (`resnet18`)"][-1] == "-"
    )
    assert rows["DPN-92 (`dpn`)"][3] == "½ 20.00"
    assert rows["DPN-92 (`dpn`)"][-1] == "BatchNorm -14.0: half an epoch here"
    assert rows["SENet-18 (`senet`)"][3::3][:2] == ["-", "-"]
    others = table1.format_tables(results)["long"]
    assert "| CIFAR-100 | 20 | PNASNet-A | 44.60 | - | 44.00 | 55.65 | - | - | 90 | - |" in others
    assert "| CIFAR-10 | 100 | VGG-16 | 93.58 | - | - | 94.56 | - | - | - | - |" in others


def test_regression_chooses_the_rate_that_ends_lowest_and_shows_divergence():
    case = ("cifar10", "simple_v1", "L2")
    name = regression.name_run
    results = {
        name(case, 1, 0.1): {**make_record(), "diverged": 12},
        name(case, 1, 0.01): make_record(20.0, curve=[[1, 2e24]]),
        name(case, 1, 0.001): make_record(30.0, curve=[[1, 4.0]]),
    }
    assert regression.choose_rate(case, 1, results) == 0.001
    assert regression.choose_rate(case, 2, results) is None
    row = "| 1 plain | - | diverged at step 12 | 2.0e+24 | 4.000 | 30.00 |"
    epoch = regression.format_tables(results)["epoch"]
    assert row in epoch and "| 2 whitened channels | - | - | - | - |" in epoch


def test_page_and_plots_depend_on_the_records_alone(tmp_path):
    results, pages = tmp_path / "results", []
    for recipe in report.RECIPES:
        names = [run.name for run in recipe.plan(lambda name: 0.0)]
        records.save(recipe.name, {name: make_record() for name in names[:-1]}, results)
    for docs in (tmp_path / "a", tmp_path / "b"):
        docs.mkdir()
        argv = ["--results", results, "--docs", docs, "--runs", tmp_path / "none"]
        report.main([str(word) for word in argv])
        pages.append({path.name: path.read_bytes() for path in docs.iterdir()})
    assert pages[0] == pages[1] and "results_regression.png" in pages[0]
    text = pages[0]["results.md"].decode()
    for recipe in report.RECIPES:
        assert f"## {recipe.title}" in text


def test_the_committed_page_is_that_of_the_committed_records(tmp_path):
    report.write_page(records.RESULTS, tmp_path)
    page = (runner.ROOT / "docs" / report.PAGE).read_bytes()
    assert (tmp_path / report.PAGE).read_bytes() == page
    readme = (runner.ROOT / report.README).read_text()
    (tmp_path / "README.md").write_text(readme)
    report.write_readme_table(records.RESULTS, tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == readme


def test_the_table_of_the_readme_has_five_rows(tmp_path):
    readme = tmp_path / "README.md"
    begin, end = report.MARKS
    readme.write_text(f"before\n{begin}an old table\n{end}after\n")
    report.write_readme_table(records.RESULTS, readme)
    before, mark, _, header, rule, *rows, _, last, after = readme.read_text().splitlines()
    assert (before, mark, last, after) == ("before", begin.strip(), end.strip(), "after")
    assert len(rows) == 5 and {row.count("|") for row in (header, rule, *rows)} == {6}
    assert all(len(row) <= 100 for row in (header, *rows))
    assert rows[0] == "| VGG-16 | 14.1 | 13.2 | 74.2 | 71.1 |"
    assert rows[1] == "| VGG-16, each kind at its own best rate | - | 64.1 | - | 71.5 |"


@pytest.mark.parametrize("text", ["no marks\n", f"a\n{report.MARKS[0]}the rest\n"])
def test_a_readme_without_both_marks_is_left_unchanged(text, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    report.write_readme_table(records.RESULTS, readme)
    assert readme.read_text() == text and f"skipped {readme}" in capsys.readouterr().out


def test_long_curves_are_averaged(tmp_path):
    rows = [f"1\t{batch}\t{batch}\t0\t0\t0\t0" for batch in range(1, 242)]
    text = "\n".join(["epoch\tbatch\tloss\ttop1\ttop5\tlr\tseconds", *rows])
    (tmp_path / "train_batch.log").write_text(text + "\n")
    curve = records.read_curve(tmp_path)
    assert len(curve) <= records.CURVE_POINTS
    assert curve[0] == [3, 2.0] and curve[-1] == [241, 241.0]


def test_published_accuracies_are_complete():
    for network in table1.NETWORKS.values():
        assert set(network["paper"]) == {"1", "20", "100"} and "1" in network["reproduced"]
        assert all(bn < deconv for bn, deconv in network["paper"].values())
