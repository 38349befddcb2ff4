"""From the command line to the story of a script, in one process or in many; and its errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO

from torch import distributed as dist

from util import console
from util.cli.parser import Parser
from util.cli.script import Script
from util.cli.settings import read_settings
from util.device import choose_algorithms, choose_device, count_processes
from util.distributed.launcher import (
    check_agreement,
    init_processes,
    launch_workers,
    local_rank,
    speaks,
    tell_if_it_fails,
    wait_for_first_error,
)
from util.errors import CheckpointError, DataError, PeerFailed, RunError, TrainingDiverged
from util.files import describe_fault
from util.training.session import RunContext


def start(
    file: str,
    script: Script,
    story: Callable[[RunContext], None],
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
    console.open_streams()
    try:
        with tell_if_it_fails():
            _run(file, script, story, argv)
    finally:
        console.flush_streams()


def _run(
    file: str, script: Script, story: Callable[[RunContext], None], argv: Sequence[str]
) -> None:
    """`start`, whose errors become one line each."""
    parser = script.parser
    try:
        with redirect_stdout(sys.stdout if speaks() else StringIO()):  # --help, once
            flags, saved = read_settings(script, argv)
        processes = count_processes(flags.use_gpu, flags.gpu)
        if launch_workers(file, argv, processes=processes, flags=flags):
            return
        choose_algorithms(flags.deterministic)
        here = local_rank()
        device = choose_device(flags.use_gpu, flags.gpu, flags.threads, here)
        with init_processes(device, flags.dist_backend) as world:
            if not world.is_first:
                console.mute()
            check_agreement(world, saved and saved["step"])
            story(RunContext(flags, saved, world, device))
    except (RunError, DataError, CheckpointError) as error:
        parser.error(str(error))
    except OSError as error:
        if error.strerror is None:  # not of the file system
            raise
        parser.error(describe_fault(error))
    except TrainingDiverged as error:
        _stop(parser, 1, f"training diverged at {error}; try a lower --lr")
    except PeerFailed:
        wait_for_first_error()
        _stop(parser, 1, "another process has failed")
    except RuntimeError as error:
        name, is_missing, _ = str(error).partition(" does not have a deterministic implementation")
        if is_missing:
            parser.error(f"--deterministic: {name} can be computed only in another way")
        if not _is_lost_contact(error):
            raise
        wait_for_first_error()
        _stop(parser, 1, f"contact to another process was lost ({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


def _stop(parser: Parser, code: int, text: str) -> None:
    parser.exit(code, f"{parser.prog}: error: {text}\n")


def _is_lost_contact(error: RuntimeError) -> bool:
    """Whether a message between processes failed, not the work of this one."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
