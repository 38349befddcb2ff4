"""Parser: typed flags, help, errors in one line, and the types of values."""

import argparse

import pytest

from util.cli.parser import (
    Parser,
    bounded_float,
    bounded_int,
    path_name,
    report_errors,
    str2bool,
)
from util.errors import RunError


@pytest.fixture
def parser():
    parser = Parser("x.py", "", "examples:\n  first:   x.py\n  second:  x.py --size 2\n")
    add = parser.add_group("numbers")
    add("-s --share", "of 100 %", bounded_int(0), 5)
    add("--batch-size --size", "images", bounded_int(1), default_text="as many as fit")
    return parser


def test_only_typed_flags_are_returned_even_if_typed_as_the_default(parser):
    assert parser.defaults() == {"share": 5, "batch_size": None}
    assert parser.parse_typed([]) == {}
    assert parser.parse_typed(["-s", "5", "--size", "2"]) == {"share": 5, "batch_size": 2}


def test_messages_spell_a_flag_as_it_was_typed(parser):
    assert parser.spelling["batch_size"] == "--batch-size"
    parser.parse_typed(["--size=2", "-s", "1"])
    assert parser.spelling == {"batch_size": "--size", "share": "-s"}


def test_help_fits_the_terminal_and_breaks_neither_flags_nor_examples(parser, monkeypatch):
    parser.add_group("more")("--flag", "see --batch-size-of-tests " * 9, bounded_int(0))
    for columns in (60, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        text = parser.format_help()
        assert max(map(len, text.splitlines())) <= min(100, columns)
        assert text.count("--batch-size-of-tests") == 9
        assert text.endswith("examples:\n  first:   x.py\n  second:  x.py --size 2\n")


def test_help_tells_the_default_and_bears_a_percent_sign(parser):
    text = " ".join(parser.format_help().split())
    assert "of 100 % (default: 5)" in text and "images (default: as many as fit)" in text


def test_an_error_is_one_line_and_exit_code_two(parser, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.error("two\n  lines")
    assert (stop.value.code, capsys.readouterr().err) == (2, "x.py: error: two; lines\n")


def test_bad_input_is_one_line_on_stderr_without_usage(parser, capsys):
    for error, status, line in (
        (RunError("no GPU"), 2, "x.py: error: no GPU"),
        (FileNotFoundError(2, "No such file", "a\nb"), 2, "x.py: error: a; b: No such file"),
        (KeyError("size"), 2, "x.py: error: 'size'"),
        (KeyboardInterrupt(), 130, "x.py: interrupted"),
    ):
        with pytest.raises(SystemExit) as stop, report_errors(parser, KeyError):
            raise error
        assert (stop.value.code, capsys.readouterr().err) == (status, f"{line}\n")
    with pytest.raises(ValueError), report_errors(parser):
        raise ValueError("a fault of the program")


def test_flags_cannot_be_shortened(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_typed(["--batch", "1"])
    assert "--batch" in capsys.readouterr().err


def test_a_value_that_could_not_be_typed_is_explained(parser):
    assert parser.explain_misfit("share", 5) == parser.explain_misfit("batch_size", None) == ""
    assert parser.explain_misfit("share", None) == "is None, which cannot be typed"
    assert "of at least 0" in parser.explain_misfit("share", -1)
    assert parser.explain_misfit("share", True).startswith("is True: expected an integer")


def test_a_path_has_a_name(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert path_name("~/runs") == "/home/me/runs" and path_name("a b") == "a b"
    for text in ("", " "):
        with pytest.raises(argparse.ArgumentTypeError, match="name of a file or folder"):
            path_name(text)


def test_true_and_false_have_four_spellings_each_in_any_case():
    assert all(str2bool(text) is True for text in ("True", "true", "1", "yes", "YES"))
    assert all(str2bool(text) is False for text in ("False", "FALSE", "0", "no", "No"))
    for text in ("maybe", "", "2", "on"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}'"):
            str2bool(text)


def test_integers_have_bounds():
    assert bounded_int(1, 10)("10") == 10
    for text in ("0", "-1", "1.5", "nan", "many", "11"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"from 1 to 10, got '{text}'"):
            bounded_int(1, 10)(text)


def test_numbers_have_bounds():
    assert bounded_float(above=0, below=1)("1e-3") == 1e-3
    for text in ("0", "-1", "nan", "inf", "much", "1"):
        with pytest.raises(argparse.ArgumentTypeError, match="above 0 and below 1"):
            bounded_float(above=0, below=1)(text)
    assert bounded_float(minimum=0)("0") == 0
