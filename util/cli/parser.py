"""A command line that refuses in one line, and the types of its values."""

from __future__ import annotations

import argparse
import math
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from shutil import get_terminal_size
from typing import Any, NoReturn
from urllib.parse import urlsplit

from util.checkpoint.validators import describe
from util.console import visible
from util.distributed.launcher import speaks, wait_for_first_error

_NOT_TYPED = object()


class HelpFormatter(argparse.HelpFormatter):
    """Help as wide as the terminal, up to 100 columns, with no flag broken at its hyphens."""

    def __init__(self, prog: str) -> None:
        super().__init__(
            prog, max_help_position=34, width=min(100, get_terminal_size((100, 24))[0])
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one line, `prog: error: ...`, with exit code 2.

    Attributes:
        spelling: of each flag, batch_size -> --batch-size; as it was typed, where it was.
    """

    def __init__(self, prog: str, description: str) -> None:
        form = {"formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(prog, description=description, **form)
        self.spelling: dict[str, str] = {}

    def error(self, message: str) -> NoReturn:
        lines = [" ".join(line.split()) for line in message.splitlines()]
        text = "; ".join(line for line in lines if line) + self._suggest(message)
        self.exit(2, f"{self.prog}: error: {text}\n")

    def _suggest(self, message: str) -> str:
        """The flag that is most like an unknown one."""
        _, unknown, words = message.partition("unrecognized arguments: ")
        near = (
            get_close_matches(words.split()[0], self._option_string_actions, 1) if unknown else []
        )
        return "".join(f"; did you mean {name}?" for name in near)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Leave, with one line; of several processes with the same trouble the first is heard."""
        message = message and visible(message.rstrip("\n")) + "\n"
        if status and not speaks():
            wait_for_first_error()
            message = f"[process {os.environ['RANK']}] {message}"
        super().exit(status, message)

    def defaults(self) -> dict[str, Any]:
        """Every flag's value where nothing is typed."""
        return vars(self.parse_args([]))

    def parse_typed(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """Only the flags that stand on the command line, by their names in the namespace."""
        blank = argparse.Namespace(**dict.fromkeys(self.defaults(), _NOT_TYPED))
        words = sys.argv[1:] if argv is None else argv
        flags = vars(self.parse_args(self._free_positional(words), blank))
        typed = {word.partition("=")[0] for word in words} & self._option_string_actions.keys()
        self.spelling |= {self._option_string_actions[name].dest: name for name in typed}
        # None: a positional that was left out, to which argparse gives its default all the same.
        return {name: v for name, v in flags.items() if v is not _NOT_TYPED and v is not None}

    def _free_positional(self, words: Sequence[str]) -> list[str]:
        """The words, but one that follows a flag whose value may be left out, and is none, first.

        argparse would take DIR for a milestone in `--milestone .4 .8 DIR`, for a truth value in
        `--compile DIR`.
        """
        if all(action.option_strings for action in self._actions):  # there is no positional
            return list(words)
        takes = {
            name: a for a in self._actions if a.nargs in ("+", "?") for name in a.option_strings
        }
        first, rest, taker = [], [], None
        for word in words:
            fits = taker is not None and _is_fit(taker.type, word)
            stray = taker is not None and not fits and not word.startswith("-")
            (first if stray else rest).append(word)
            taker = takes.get(word, taker if fits and taker.nargs == "+" else None)
        return first + rest

    def find_misfit(self, name: str, value: Any) -> str:
        """What is wrong with a flag's value that was not typed; nothing if it could have been."""
        action = next(action for action in self._actions if action.dest == name)
        if action.nargs == "+" and type(value) is list and value:
            return next(filter(None, (_find_misfit(action, item) for item in value)), "")
        return _find_misfit(action, value)

    def add_group(self, title: str) -> Callable[..., None]:
        """Return add(flags, text, kind, default, default_text=, ...), which adds a flag to a group.

        The help is `text` and, in parentheses, `default_text` or else the default.
        """
        group = self.add_argument_group(title)

        def add(
            flags: str,
            text: str,
            kind: Callable[[str], Any] | None = None,
            default: Any = None,
            default_text: Any = None,
            **more: Any,
        ) -> None:
            default_text = default if default_text is None else default_text
            text = text if default_text in (None, "") else f"{text} ({default_text})"
            text = text.replace("%", "%%")
            more |= {"type": kind} if kind else {}
            more |= {"metavar": "BOOL"} if kind is str2bool else {}
            action = group.add_argument(*flags.split(), help=text, default=default, **more)
            names = [name for name in flags.split() if name.startswith("--")]
            self.spelling[action.dest] = names[0] if names else more["metavar"]

        return add


def _find_misfit(action: argparse.Action, value: Any) -> str:
    shown = f"is {describe(value)}"
    if type(value) not in ((bool,) if action.nargs == 0 else (bool, int, float, str)):
        return f"{shown}, which cannot be typed"
    try:
        same = value if action.nargs == 0 else (action.type or str)(str(value))
    except (argparse.ArgumentTypeError, ValueError) as error:  # ValueError: thousands of digits
        return f"{shown}: {error}"
    if type(same) is not type(value) and not (type(same) is float and type(value) is int):
        return f"{shown}, not of type {type(same).__name__}"
    lost = action.choices and same not in action.choices
    return f"{shown}, not one of {', '.join(action.choices)}" if lost else ""


def _is_fit(kind: Callable[[str], Any], word: str) -> bool:
    try:
        kind(word)
    except argparse.ArgumentTypeError:
        return False
    return True


def place(text: str) -> str:
    """The name of a file or folder, with ~ for the user's own."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected the name of a file or folder, got {text!r}")
    return os.path.expanduser(text)


def str2bool(text: str) -> bool:
    """True/False, yes/no or 1/0, in any case."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected True or False (or yes/no, 1/0), got {text!r}")
    return words[text.lower()]


def whole(least: int, most: int = 10**9) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""
    bounds = f"from {least} to {most}"

    def parse(text: str) -> int:
        try:
            if least <= int(text) <= most:
                return int(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"expected a whole number {bounds}, got {text!r}")

    return parse


def real(
    *,
    least: float | None = None,
    above: float | None = None,
    below: float = math.inf,
    most: float = math.inf,
) -> Callable[[str], float]:
    """A finite number; `least` and `most` themselves are allowed, `above` and `below` are not."""
    bounds = f"of at least {least:g}" if above is None else f"above {above:g}"
    end = f"below {below:g}" if most == math.inf else f"at most {most:g}"
    bounds += " and finite" if below == most else f" and {end}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if (value >= least if above is None else value > above) and value < below and value <= most:
            return value
        raise argparse.ArgumentTypeError(f"expected a number {bounds}, got {text!r}")

    return parse


def mirror_url(text: str) -> str:
    """The address of a folder: https://, http:// or file:///."""
    url = urlsplit(text)
    known = {"https": url.netloc, "http": url.netloc, "file": url.path.strip("/")}
    if known.get(url.scheme) and text.isprintable() and " " not in text:
        return text
    raise argparse.ArgumentTypeError(
        f"expected https://HOST/FOLDER, http:// or file:///FOLDER without blanks, got {text!r}"
    )


def meeting_url(text: str) -> str:
    """tcp://HOST:PORT or env://."""
    url = urlsplit(text)
    try:
        if text == "env://" or (url.scheme == "tcp" and url.hostname and url.port):
            return text
    except ValueError:  # a port that is no number
        pass
    raise argparse.ArgumentTypeError(f"expected tcp://HOST:PORT or env://, got {text!r}")
