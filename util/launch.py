"""From the command line to the story of a script, in one process or in many; and its errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO

from torch import distributed as dist

from . import console, distributed, run
from .checkpoint import CheckpointError, describe_fault
from .data import DataError
from .engine import TrainingDiverged
from .parser import Parser
from .settings import Script, read_settings
from .training import Session


def start(
    file: str,
    script: Script,
    story: Callable[[Session], None],
    argv: Sequence[str] | None = None,
) -> None:
    """Do what the command line says.

    Every visible GPU gets a process of its own, which runs `story`; see `distributed`.

    Args:
        file: of the script, to be run once for each device.
        argv: None: the command line of this process.

    Raises:
        SystemExit: code 2 bad input, 1 diverged or another process lost, 130 after SIGINT, 143
            after SIGTERM, 129 after SIGHUP.
    """
    argv = sys.argv[1:] if argv is None else argv
    console.answer()
    try:
        with distributed.tell_if_it_fails():
            _run(file, script, story, argv)
    finally:
        console.hang_up()


def _run(file: str, script: Script, story: Callable[[Session], None], argv: Sequence[str]) -> None:
    """`start`, whose errors become one line each."""
    parser = script.parser
    try:
        with redirect_stdout(sys.stdout if distributed.speaks() else StringIO()):  # --help, once
            flags, saved = read_settings(script, argv)
        processes = run.count_processes(flags.use_gpu, flags.gpu)
        if distributed.spread(file, argv, processes=processes, flags=flags):
            return
        run.choose_algorithms(flags.deterministic)
        here = distributed.local_rank()
        device = run.choose_device(flags.use_gpu, flags.gpu, flags.threads, here)
        with distributed.join(device, flags.dist_backend) as world:
            if not world.is_first:
                console.mute()
            distributed.check_agreement(world, saved and saved["step"])
            story(Session(flags, saved, world, device))
    except (run.RunError, DataError, CheckpointError) as error:
        parser.error(str(error))
    except OSError as error:
        if error.strerror is None:  # not of the file system
            raise
        parser.error(describe_fault(error))
    except TrainingDiverged as error:
        _stop(parser, 1, f"training diverged at {error}; try a lower --lr")
    except distributed.Elsewhere:
        distributed.let_the_guilty_speak()
        _stop(parser, 1, "another process has failed")
    except RuntimeError as error:
        name, is_missing, _ = str(error).partition(" does not have a deterministic implementation")
        if is_missing:
            parser.error(f"--deterministic: {name} can be computed only in another way")
        if not _is_lost_contact(error):
            raise
        distributed.let_the_guilty_speak()
        _stop(parser, 1, f"contact to another process was lost ({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


def _stop(parser: Parser, code: int, text: str) -> None:
    parser.exit(code, f"{parser.prog}: error: {text}\n")


def _is_lost_contact(error: RuntimeError) -> bool:
    """Whether a message between processes failed, not the work of this one."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
