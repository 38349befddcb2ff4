import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from scripts import compare
from tests.pairwise import loop_over
from util.tracking.logger import RunLogger

ROOT = Path(compare.__file__).parent.parent


def make_run(folder, kind="bn", epochs=2, flags=(), test_columns=(), **summary):
    logger = RunLogger(folder, tensorboard=False, plot=False, test_columns=test_columns)
    for epoch in range(1, epochs + 1):
        values = {"loss": 1.0, "top1": 50.0, "top5": 90.0, "lr": 0.1, "seconds": 2.0}
        values |= {"steps": 4, "images": 8, **dict.fromkeys(test_columns, 51.0)}
        logger.batch(epoch, 4 * epoch, values)
        logger.epoch(epoch, values, values)
    known = {"kind": kind, "lr": 0.1, "epochs": epochs, "steps": 8, "epoch_steps": 4}
    known.update(best_test_top1=50.125, test_top1=49.5, test_loss=1.25)
    known.update(train_seconds=4.0, images_per_second=1234.4)
    logger.summary({**known, "parameters": 9231114, "peak_memory_mb": 700.2, **summary})
    logger.close()
    (folder / "args.json").write_text(json.dumps({"flags": {"seed": 7, **dict(flags)}}))
    return str(folder)


def test_the_command_prints_the_table_and_writes_table_and_figure(tmp_path):
    runs = [make_run(tmp_path / kind, kind) for kind in ("bn", "deconv-mode5")]
    command = [sys.executable, "scripts/compare.py", *runs, "--out", str(tmp_path / "new" / "cmp")]
    end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    table = (tmp_path / "new" / "cmp.md").read_text()
    assert end.stdout.startswith(table)
    assert end.stdout.endswith(f"wrote {tmp_path / 'new' / 'cmp.png'} and cmp.md\n")
    assert end.stderr == ""
    header, _, bn, deconv = table.splitlines()
    assert header.count("|") == bn.count("|") == deconv.count("|") == 14
    assert header.index("final top-1") < header.index("best top-1")
    assert bn == (
        "| bn | bn | 0.1 | 7 | 2 | 8 | 49.50 | 50.12 | 1.2500 | 4.0 | 1,234 | 9,231,114 | 700 |"
    )
    assert deconv.startswith("| deconv-mode5 | deconv-mode5 | 0.1 | 7 |")
    with Image.open(tmp_path / "new" / "cmp.png") as image:
        image.load()
        assert image.width > 1000


def test_a_run_with_validation_images_is_compared_with_one_without(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("plain", "held-out")]
    log = (tmp_path / "plain" / "test.log").read_text()
    (tmp_path / "held-out" / "val.log").write_text(log)
    compare.main([*runs, "--out", str(tmp_path / "cmp")])
    assert "| held-out |" in (tmp_path / "cmp.md").read_text()
    (tmp_path / "held-out" / "val.log").write_text(log.splitlines(True)[0])
    with pytest.raises(SystemExit):
        compare.main([*runs, "--out", str(tmp_path / "cmp")])


def test_tensorboard_shows_the_newest_figure_and_table(tmp_path):
    runs = [make_run(tmp_path / kind, kind) for kind in ("bn", "deconv-mode5")]
    words = ["--out", str(tmp_path / "cmp"), "--tensorboard", str(tmp_path / "events")]
    for compared in (runs[:1], runs):
        compare.main([*compared, *words])
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    (figure,) = events.Tensors("test/comparison")
    (table,) = events.Tensors("comparison/text_summary")
    width, _, pixels = figure.tensor_proto.string_val
    assert int(width) > 1000 and pixels.startswith(b"\x89PNG")
    assert table.tensor_proto.string_val == [(tmp_path / "cmp.md").read_bytes()]


def test_runs_that_differ_in_the_seed_alone_become_a_group_with_mean_and_deviation(tmp_path):
    default, typed = {"seed": 0, "rows_per_feature": 24}, {"seed": 1, "rows_per_feature": 24.0}
    runs = [
        make_run(tmp_path / f"{kind}-seed{flags['seed']}", kind, flags=flags, test_top1=top1)
        for kind in ("bn", "deconv-mode5")
        for flags, top1 in ((default, 40.0), (typed, 50.0))
    ]
    runs.append(make_run(tmp_path / "bn-wide", flags={"seed": 2, "arch": "other"}))
    read = [compare.read_run(Path(run), Path(run).name) for run in runs]
    groups = compare.group_seeds(read)
    assert [[run.name for run in group] for group in groups] == [
        ["bn-seed0", "bn-seed1"],
        ["deconv-mode5-seed0", "deconv-mode5-seed1"],
        ["bn-wide"],
    ]
    rows = compare.format_table(groups).splitlines()[2:]
    assert rows[2].startswith("| bn (mean ± std) | bn | 0.1 | 2 seeds | 2 | 8 | 45.00 ± 7.07 |")
    assert compare.label_groups(groups)[1] == "deconvolution mode 5, lr 0.1, 2 seeds"
    again = compare.group_seeds([*read[:2], *read[:2]])
    assert [len(group) for group in again] == [2, 2]  # a repeated seed is no new evidence


def test_a_suffix_of_out_is_not_doubled(tmp_path, capsys):
    compare.main([make_run(tmp_path / "a"), "--out", str(tmp_path / "v1.2.png")])
    assert {path.name for path in tmp_path.iterdir()} == {"a", "v1.2.png", "v1.2.md"}


def test_runs_are_named_by_what_tells_them_apart():
    names = compare.name_runs([Path("runs/x-bn/1"), Path("runs/x-deconv/2")])
    assert names == ["x-bn/1", "x-deconv/2"]
    assert compare.name_runs([Path("runs/a"), Path("runs/b")]) == ["a", "b"]
    assert compare.name_runs([Path("runs/a"), Path("runs/a")]) == ["a", "a"]
    assert compare.name_runs([Path("runs/a/1"), Path("runs/a")]) == ["a/1", "a"]
    assert compare.name_runs([Path("runs/a")]) == ["a"]


def test_names_cannot_break_the_table_or_the_legend(tmp_path, capsys):
    run = make_run(tmp_path / "a|b\\|c\nd $x^ <b> [x](y) \x1b", kind="_k|")
    compare.main([run, "--out", str(tmp_path / "cmp")])
    row = (tmp_path / "cmp.md").read_text().splitlines()[2]
    assert row.startswith("| a\\|b\\\\\\|c d $x^ \\<b> \\[x](y) \\\\x1b | _k\\| | 0.1 | 7 |")


def test_what_a_run_did_not_tell_or_lost_to_infinity_is_a_dash(tmp_path, capsys):
    run = make_run(tmp_path / "a", test_loss=float("nan"), peak_memory_mb=None)
    (tmp_path / "a" / "args.json").write_text("{}")
    compare.main([run, "--out", str(tmp_path / "cmp")])
    row = (tmp_path / "cmp.md").read_text().splitlines()[2]
    assert row == "| a | bn | 0.1 | - | 2 | 8 | 49.50 | 50.12 | - | 4.0 | 1,234 | 9,231,114 | - |"


def test_runs_with_a_moving_average_add_a_column(tmp_path):
    average = {"test_columns": ("ema_loss", "ema_top1"), "test_ema_top1": 51.0}
    runs = [make_run(tmp_path / "a", **average), make_run(tmp_path / "b")]
    compare.main([*runs, "--out", str(tmp_path / "cmp")])
    header, _, *rows = (tmp_path / "cmp.md").read_text().splitlines()
    column = header.split(" | ").index("final top-1 of the average (%)")
    assert [row.split(" | ")[column] for row in rows] == ["51.00", "-"]


@loop_over(
    ("flags", "steps", "cell"),
    [
        ({"epochs": 9, "max_steps": None}, 8, "2 of 9"),
        ({"epochs": 2, "max_steps": None}, 8, "2"),
        ({"epochs": 9, "max_steps": 7}, 7, "2"),
        ({"epochs": 9, "max_steps": 13}, 8, "2 of 4"),
    ],
)
def test_a_run_that_has_not_come_to_its_end_says_so(tmp_path, flags, steps, cell):
    run = compare.read_run(Path(make_run(tmp_path / "a", flags=flags, steps=steps)), "a")
    assert str(compare.count_epochs(run)) == cell
    assert run.curves.epoch_steps == 4


def refuse(runs, out, capsys):
    """The error in which the command ends."""
    with pytest.raises(SystemExit) as end:
        compare.main([*runs, "--out", str(out)])
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.startswith("compare.py: error: ")
    assert message.count("\n") == 1 and not out.with_suffix(".md").exists()
    return message


@loop_over("name", compare.FILES)
def test_a_folder_that_lacks_a_file_is_refused_by_both_names(tmp_path, capsys, name):
    good, bad = make_run(tmp_path / f"good-{name}"), make_run(tmp_path / f"bad-{name}")
    Path(bad, name).unlink()
    message = refuse([good, bad], tmp_path / "cmp", capsys)
    assert f"{bad} is no folder of a finished run: {name} is missing" in message


@loop_over(
    "name, text, reason",
    [
        ("summary.json", "{", "summary.json is not JSON"),
        ("args.json", "[]", "args.json does not hold a JSON object"),
        ("train.log", "", "train.log: the header must be epoch loss"),
        ("test.log", "epoch\tloss\ttop1\ttop5\tlr\tseconds\n1\n", "test.log, line 2"),
        ("train.log", "epoch\tloss\ttop1\ttop5\tlr\tseconds\n", "must have a row for each epoch"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, capsys, name, text, reason):
    run = make_run(tmp_path / "a")
    (tmp_path / "a" / name).write_text(text)
    assert reason in refuse([run], tmp_path / "cmp", capsys)


def test_a_folder_that_is_not_there_is_refused_in_one_line(tmp_path, capsys):
    message = refuse([str(tmp_path / "nothing")], tmp_path / "cmp", capsys)
    assert "nothing is no folder of a finished run" in message
