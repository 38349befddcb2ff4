"""Read flags from a YAML file of a user or from the args.json of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from util.cli.parser import Parser
from util.tracking.provenance import RECORD_NAME

# Flags of args.json that another run does not take over: its start, its folder and its machines.
OF_ONE_START = {
    *("config", "preset", "resume", "run_dir", "out", "evaluate"),
    *("world_size", "rank", "dist_url", "dist_backend", "multiprocessing_distributed"),
}


def read_config(path: str, parser: Parser) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the flags of a YAML file and the flags of an args.json, one of them empty.

    The flags of YAML count as typed. The flags of args.json do not, because a run also records
    flags without effect.

    Args:
        path: YAML file whose keys are flags, args.json, or the folder of a run.
        parser: checks names and values as on the command line.

    Raises:
        SystemExit: code 2, with one line that names the file, the flag and its value.
    """
    file = Path(path) / RECORD_NAME if Path(path).is_dir() else Path(path)
    parser.source = f"--config {file}: "
    try:
        text = file.read_text(encoding="utf-8")
        recorded = _find_recorded(text)
        entries = _parse_yaml(text) if recorded is None else recorded.items()
        flags = parser.parse_typed(list(_to_words(entries, parser)))
    except OSError as error:
        parser.error(str(error.strerror))
    except ValueError as error:  # also if the text is not UTF-8
        parser.error(str(error))
    if "config" in flags:
        parser.error(f"config {flags['config']}: a file cannot name another one")
    parser.source = ""
    return (flags, {}) if recorded is None else ({}, flags)


def _find_recorded(text: str) -> dict[str, Any] | None:
    """Return the flags that an args.json holds for another run; None if it is no args.json."""
    with suppress(ValueError):
        record = json.loads(text)
        if isinstance(record, dict) and isinstance(record.get("flags"), dict):
            flags = record["flags"]
            names = [name for name in flags if name not in OF_ONE_START]
            return {name: flags[name] for name in names if flags[name] is not None}
    return None


def _parse_yaml(text: str) -> Iterator[tuple[str, Any]]:
    """Yield keys and values of YAML as they are written: `off` and 1e-3 stay words."""
    try:
        import yaml
    except ImportError as error:
        raise ValueError("YAML needs PyYAML, which is missing: pip install pyyaml") from error
    try:
        root = yaml.compose(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("holds no flags; expected lines of NAME: VALUE")
    for key, value in root.value:
        is_list = isinstance(value, yaml.SequenceNode)
        nodes = [key, *(value.value if is_list else [value])]
        if not all(isinstance(node, yaml.ScalarNode) for node in nodes):
            raise ValueError(f"{key.value}: expected a value or a list of values")
        yield key.value, [node.value for node in value.value] if is_list else value.value


def _to_words(entries: Iterable[tuple[str, Any]], parser: Parser) -> Iterator[str]:
    """Yield the command line that sets these flags.

    Raises:
        ValueError: a flag is set twice, or takes one value and has a list.
    """
    seen = set()
    for key, value in entries:
        action, values = parser.find_flag(key), value if isinstance(value, list) else [value]
        if action in seen:
            raise ValueError(f"{key}: this flag is set twice")
        if action and values is value and action.nargs != "+":
            raise ValueError(f"{key}: expected one value, got a list of {len(value)}")
        seen |= {action} - {None}
        options = [f"--{key.lstrip('-')}"] if action is None else action.option_strings
        option = next((option for option in options if option.startswith("--")), None)
        if option and values is not value:
            yield f"{option}={value}"
        else:
            yield from ([option] if option else [])
            yield from map(str, values)
