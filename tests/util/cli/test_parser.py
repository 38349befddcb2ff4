"""A command line that refuses in one line, and the types of its values."""

import argparse

import pytest

from util.cli.parser import Parser, bounded_float, bounded_int, path_name, str2bool


@pytest.fixture
def parser():
    parser = Parser("x.py", "")
    add = parser.add_group("numbers")
    add("-s --share", "of 100 %", bounded_int(0), 5)
    add("--batch-size --size", "images", bounded_int(1), default_text="as many as fit")
    return parser


def test_only_what_is_typed_is_returned_even_if_typed_as_the_default(parser):
    assert parser.defaults() == {"share": 5, "batch_size": None}
    assert parser.parse_typed([]) == {}
    assert parser.parse_typed(["-s", "5", "--size", "2"]) == {"share": 5, "batch_size": 2}


def test_messages_spell_a_flag_as_it_was_typed(parser):
    assert parser.spelling["batch_size"] == "--batch-size"
    parser.parse_typed(["--size=2", "-s", "1"])
    assert parser.spelling == {"batch_size": "--size", "share": "-s"}


def test_help_fits_the_terminal_and_breaks_no_flag(parser, monkeypatch):
    parser.add_group("more")("--flag", "see --batch-size-of-tests " * 9, bounded_int(0))
    for columns in (60, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        text = parser.format_help()
        assert max(map(len, text.splitlines())) <= min(100, columns)
        assert text.count("--batch-size-of-tests") == 9


def test_help_tells_the_default_or_what_stands_for_it_and_bears_a_percent_sign(parser):
    text = " ".join(parser.format_help().split())
    assert "of 100 % (default: 5)" in text and "images (default: as many as fit)" in text


def test_an_error_is_one_line_and_exit_code_two(parser, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.error("two\n  lines")
    assert (stop.value.code, capsys.readouterr().err) == (2, "x.py: error: two; lines\n")


def test_flags_cannot_be_shortened(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_typed(["--batch", "1"])
    assert "--batch" in capsys.readouterr().err


def test_a_place_has_a_name(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert path_name("~/runs") == "/home/me/runs" and path_name("a b") == "a b"
    for text in ("", " "):
        with pytest.raises(argparse.ArgumentTypeError, match="name of a file or folder"):
            path_name(text)


@pytest.mark.parametrize("text", ["True", "true", "1", "yes", "YES"])
def test_true(text):
    assert str2bool(text) is True


@pytest.mark.parametrize("text", ["False", "FALSE", "0", "no", "No"])
def test_false(text):
    assert str2bool(text) is False


@pytest.mark.parametrize("text", ["maybe", "", "2", "on"])
def test_neither_true_nor_false(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}'"):
        str2bool(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "nan", "many", "11"])
def test_whole_numbers_have_bounds(text):
    assert bounded_int(1, 10)("10") == 10
    with pytest.raises(argparse.ArgumentTypeError, match=f"from 1 to 10, got '{text}'"):
        bounded_int(1, 10)(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "much", "1"])
def test_real_numbers_have_bounds(text):
    assert bounded_float(above=0, below=1)("1e-3") == 1e-3
    with pytest.raises(argparse.ArgumentTypeError, match="above 0 and below 1"):
        bounded_float(above=0, below=1)(text)
    assert bounded_float(minimum=0)("0") == 0
