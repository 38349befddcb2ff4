"""Commands of main.py and main_imagenet.py in documents and scripts, and their flags."""

import re
import shlex

import main
import main_imagenet
from util.cli.settings import read_settings

SCRIPTS = {"main": main, "main_imagenet": main_imagenet}


def find_commands(path):
    """Yield script and arguments of each `python main.py ...` in a file, also by torchrun.

    Continued lines and code spans over two lines are joined. Arrays of a shell script are expanded.
    """
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    span = r"(`[^`\n]*\b(?:python3?|torchrun)\b[^`\n]*)\n\s*(?=[^`\n]+`)"
    text = re.sub(span, r"\1 ", text)
    arrays = dict(re.findall(r"^(\w+)=\((.*)\)$", text, flags=re.MULTILINE))
    pattern = r"\b(?:python3?|torchrun\b[^\n`]*) (main|main_imagenet)\.py\b([^\n`|>]*)"
    for script, line in re.findall(pattern, text):
        for name, words in arrays.items():
            line = line.replace(f'"${{{name}[@]}}"', words)
        line = line.replace('"$@"', "").replace("$out", "out")
        yield SCRIPTS[script], shlex.split(line, comments=True)


def read_flags(argv, script=main):
    """Return all flags as a script would take them; files are not there to be read."""
    if {"--resume", "--config"} & set(argv):
        return script.build_script().parser.parse_typed(argv)
    return vars(read_settings(script.build_script(), argv)[0])
