"""What a person watching sees."""

import io
import os
import subprocess
import sys
from functools import partial

import pytest

from util import console


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [80, 120])
def test_figures_and_time_left_fit_into_a_terminal(monkeypatch, columns):
    terminal = Terminal()
    size = os.terminal_size((columns, 24))
    monkeypatch.setattr(console.shutil, "get_terminal_size", lambda *_: size)
    monkeypatch.setattr(console, "tqdm", partial(console.tqdm, file=terminal))
    with console.progress_bar(range(391), "epoch 12/100", total=391) as bar:
        bar.update(200)
        bar.set_postfix_str("loss 2.300, top1 15.6%, 1379 images/s")
    last = terminal.getvalue().split("\r")[-3]
    assert last.startswith("epoch 12/100 |") and last.endswith("images/s")
    assert "200/391" in last and "left, loss 2.300, top1 15.6%" in last
    assert len(last) <= columns


def test_there_is_no_bar_where_there_is_no_terminal(capsys):
    assert list(console.progress_bar(range(3), "test")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_names_command_no_terminal_and_make_no_lines(capsys):
    name = "a\x1b[2Jb\nc\udcffd \u202e é"
    console.print_line(name)
    assert capsys.readouterr().out == "a\\x1b[2Jb\\nc\\udcffd \\u202e é\n"


@pytest.mark.parametrize("shell", [">/dev/full", "| true", ">&- 2>&-"])
def test_a_line_that_cannot_be_written_ends_nothing(shell):
    lines = (
        "console.open_streams(); [console.print_line('x' * 9999) for _ in range(20)]; "
        "console.flush_streams()"
    )
    code = f"from util import console; {lines}"
    words = ["bash", "-c", f'"$0" -c "$1" {shell}; exit $PIPESTATUS', sys.executable, code]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
