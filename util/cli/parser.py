"""Command-line parser that reports errors in one line, and the types of flag values."""

from __future__ import annotations

import argparse
import os
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from math import inf, nan
from shutil import get_terminal_size
from typing import Any, NoReturn
from urllib.parse import urlsplit

from util.console import visible
from util.distributed.launcher import is_first_process, wait_for_first_error
from util.errors import CheckpointError, DataError, RunError, describe
from util.files import describe_fault

LARGEST = 10**9  # integer that a flag accepts by default


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal, at most 100 columns; flags and examples stay in one piece."""

    def __init__(self, prog: str) -> None:
        columns = get_terminal_size((100, 24))[0]
        super().__init__(prog, max_help_position=34, width=min(100, columns))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """Parser that reports an error in one line, `prog: error: ...`, with exit code 2.

    Attributes:
        spelling: name in the namespace -> the flag as typed, or else its first long spelling.
        source: file of the flags that are read, in front of error messages; "" on a command line.
    """

    def __init__(self, prog: str, description: str, examples: str | None = None) -> None:
        form = {"formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(prog, None, description, examples, **form)
        self.spelling: dict[str, str] = {}
        self.source = ""

    def error(self, message: str, status: int = 2) -> NoReturn:
        """Print `message` on stderr as one line, `prog: error: message`, and exit."""
        lines = [" ".join(line.split()) for line in message.splitlines()]
        text = "; ".join(line for line in lines if line) + self._suggest_flag(message)
        self.exit(status, f"{self.prog}: error: {self.source}{text}\n")

    def _suggest_flag(self, message: str) -> str:
        """Return "; did you mean --flag?" where `message` is about an unknown flag.

        Flags that contain the unknown word precede flags of similar spelling.
        """
        unknown = re.search(r"unrecognized arguments: ([^\s=]+)", message)
        if not unknown:
            return ""
        names, word = self._option_string_actions, unknown[1].strip("-")
        longer = [name for name in names if len(word) > 2 and word in name]
        count, cutoff = (3, 0) if longer else (1, 0.6)
        names = get_close_matches(unknown[1], longer or names, count, cutoff)
        return f"; did you mean {' or '.join(names)}?" if names else ""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Exit with one line; other ranks wait first, so that one error is printed, not many."""
        message = message and visible(message.rstrip("\n")) + "\n"
        if status and not is_first_process():
            wait_for_first_error()
            message = f"[process {os.environ['RANK']}] {message}"
        super().exit(status, message)

    def complete(self) -> None:
        """Answer a shell that asks for completions, by argcomplete, and exit; else return."""
        if "_ARGCOMPLETE" in os.environ:
            try:
                import argcomplete
            except ImportError:
                self.exit(1)  # going on would start a training
            argcomplete.autocomplete(self)

    def defaults(self) -> dict[str, Any]:
        """Return the value of every flag on an empty command line."""
        return vars(self.parse_args([]))

    def parse_typed(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return name -> value of the flags that stand in `argv`; defaults are left out."""
        untyped = argparse.Namespace(**dict.fromkeys(self.spelling))
        flags = vars(self.parse_args(self._move_positionals_first(argv), untyped))
        typed = {word.partition("=")[0] for word in argv} & self._option_string_actions.keys()
        self.spelling |= {self._option_string_actions[name].dest: name for name in typed}
        return {name: value for name, value in flags.items() if value is not None}

    def find_flag(self, name: str) -> argparse.Action | None:
        """Return the flag that a file calls `name`, with - or _; None if there is none."""
        flags = {action.dest: action for action in self._actions} | self._option_string_actions
        return flags.get(f"--{name.lstrip('-').replace('_', '-')}", flags.get(name))

    def _move_positionals_first(self, argv: Sequence[str]) -> list[str]:
        """Move a positional to the front if it follows a flag with an optional or repeated value.

        argparse would take DIR for the flag's value in `--milestone 0.4 DIR` and `--deconv DIR`.
        """
        if all(action.option_strings for action in self._actions):  # no positional
            return list(argv)
        flags = self._option_string_actions.items()
        open_ended = {name: action for name, action in flags if action.nargs in ("+", "?")}
        positionals, rest, flag = [], [], None
        for word in argv:
            is_value = flag is not None and _is_valid(flag.type, word)
            is_positional = flag is not None and not is_value and not word.startswith("-")
            (positionals if is_positional else rest).append(word)
            flag = open_ended.get(word, flag if is_value and flag.nargs == "+" else None)
        return positionals + rest

    def explain_misfit(self, name: str, value: Any) -> str:
        """Return why `value` could not have been typed for the flag `name`; "" if it could."""
        action = next(action for action in self._actions if action.dest == name)
        if value is None and action.default is None:  # nothing was typed
            return ""
        is_list = action.nargs == "+" and type(value) is list and value
        reasons = (_explain_misfit(action, item) for item in (value if is_list else [value]))
        return next(filter(None, reasons), "")

    def add_group(self, title: str, description: str | None = None) -> Callable[..., None]:
        """Return `add(flags, text, parse, default, default_text, **kwargs)` for one group of flags.

        The help is `text`, its lines joined, and in parentheses `default_text` or else the default.
        It calls a value N, unless `kwargs` has a metavar. A flag of type `str2bool` may be typed
        without a value, which means True. A shell completes the words of `complete`.
        """
        group = self.add_argument_group(title, description)

        def add(
            flags: str,
            text: str,
            parse: Callable[[str], Any] | None = None,
            default: Any = None,
            default_text: Any = None,
            complete: Collection[str] = (),
            **kwargs: Any,
        ) -> None:
            default_text = default if default_text is None else default_text
            text = text if default_text in (None, "") else f"{text} (default: {default_text})"
            text = text.replace("%", "%%")
            if parse is str2bool:
                kwargs = {"metavar": "BOOL", "nargs": "?", "const": True} | kwargs
                complete = ("True", "False")
            if parse is not None:
                kwargs = {"type": parse, "metavar": "N"} | kwargs
            action = group.add_argument(*flags.split(), help=text, default=default, **kwargs)
            if complete:
                action.completer = lambda **_: complete  # type: ignore[attr-defined]
            names = [name for name in flags.split() if name.startswith("--")]
            self.spelling[action.dest] = names[0] if names else kwargs["metavar"]

        return add


@contextmanager
def report_errors(parser: Parser, *others: type[Exception]) -> Iterator[None]:
    """Report bad input in one line, `SCRIPT: error: MESSAGE`, with exit code 2; 130 after Ctrl-C.

    Args:
        parser: parser of the script.
        others: further errors that bad input causes in this script.

    Example:
        >>> with report_errors(Parser("show.py", "Show a file.")):
        ...     open("missing.txt")
        Traceback (most recent call last):
        SystemExit: 2
    """
    try:
        yield
    except (RunError, DataError, CheckpointError, *others) as error:
        parser.error(str(error))
    except OSError as error:
        if error.strerror is None:  # not from the file system
            raise
        parser.error(describe_fault(error))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


def _explain_misfit(action: argparse.Action, value: Any) -> str:
    text = f"is {describe(value)}"
    if type(value) not in (bool, int, float, str):
        return f"{text}, which cannot be typed"
    try:
        parsed = (action.type or str)(str(value))
    except (argparse.ArgumentTypeError, ValueError) as error:  # ValueError: thousands of digits
        return f"{text}: {error}"
    if type(parsed) is not type(value) and not (type(parsed) is float and type(value) is int):
        return f"{text}, not of type {type(parsed).__name__}"
    if action.choices and parsed not in action.choices:
        return f"{text}, not one of {', '.join(action.choices)}"
    return ""


def _is_valid(parse: Callable[[str], Any], word: str) -> bool:
    try:
        parse(word)
    except argparse.ArgumentTypeError:
        return False
    return True


def _expect(is_valid: Any, expected: str, text: str) -> None:
    if not is_valid:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


def _parse_number(kind: type, text: str) -> float:
    """Return the number, NaN if `text` is none."""
    try:
        return kind(text)
    except ValueError:
        return nan


def bounded_int(minimum: int, maximum: int = LARGEST) -> Callable[[str], int]:
    """Return a parser of integers from `minimum` to `maximum`."""
    bounds = f"from {minimum} to {maximum}" if maximum < LARGEST else f"of at least {minimum}"

    def parse(text: str) -> int:
        value = _parse_number(int, text)
        expected = f"of at most {maximum}" if value > maximum >= LARGEST else bounds
        _expect(minimum <= value <= maximum, f"an integer {expected}", text)
        return value

    return parse


def bounded_float(
    *, minimum: float = -inf, above: float = -inf, below: float = inf, maximum: float = inf
) -> Callable[[str], float]:
    """Return a parser of finite numbers; `above` and `below` are exclusive bounds."""
    low = f"of at least {minimum:g}" if above == -inf else f"above {above:g}"
    high = f"below {below:g}" if maximum == inf else f"at most {maximum:g}"
    expected = f"a number {low} and {'finite' if below == maximum else high}"

    def parse(text: str) -> float:
        value = _parse_number(float, text)
        _expect(minimum <= value <= maximum and above < value < below, expected, text)
        return value

    return parse


def path_name(text: str) -> str:
    """Return the name of a file or folder, with ~ expanded."""
    _expect(text.strip() and "\0" not in text, "the name of a file or folder", text)
    return os.path.expanduser(text)


def str2bool(text: str) -> bool:
    """Parse True/False, yes/no or 1/0, in any case."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    _expect(text.lower() in words, "True or False (or yes/no, 1/0)", text)
    return words[text.lower()]


def mirror_url(text: str) -> str:
    """Check the URL of a folder: https://, http:// or file:///."""
    url = urlsplit(text)
    place = {"https": url.netloc, "http": url.netloc, "file": url.path.strip("/")}.get(url.scheme)
    is_valid = place and text.isprintable() and " " not in text
    _expect(is_valid, "https://HOST/FOLDER, http:// or file:///FOLDER without blanks", text)
    return text


def rendezvous_url(text: str) -> str:
    """Check the URL where machines meet: tcp://HOST:PORT or env://."""
    url = urlsplit(text)
    try:
        is_tcp = url.scheme == "tcp" and url.hostname and url.port
    except ValueError:  # the port is not a number
        is_tcp = False
    _expect(text == "env://" or is_tcp, "tcp://HOST:PORT or env://", text)
    return text
