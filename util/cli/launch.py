"""Entry point of a script: parse flags, start one process per device, report errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO

from torch import distributed as dist

from util import console
from util.cli.parser import Parser, report_errors
from util.cli.script import Script
from util.cli.settings import read_settings
from util.device import choose_algorithms, choose_device, count_processes
from util.distributed.launcher import (
    announce_failure,
    check_agreement,
    init_processes,
    is_first_process,
    launch_workers,
    local_rank,
    wait_for_first_error,
)
from util.errors import BadImage, DataError, PeerFailed, TrainingDiverged
from util.tracking.run_dir import find_run_dir
from util.training.session import RunContext


def start(
    file: str, script: Script, run: Callable[[RunContext], None], argv: Sequence[str] | None = None
) -> None:
    """Parse the command line and call `run` in one process per visible GPU, or on the CPU.

    Args:
        file: path of the script, which every worker process runs.
        script: command line of `file`.
        run: trains or tests.
        argv: words of the command line; None: those of this process.

    Raises:
        SystemExit: code 2 for bad input, 1 if training diverged or another process failed, 130
            after SIGINT, 143 after SIGTERM, 129 after SIGHUP.
    """
    script.parser.complete()
    argv = sys.argv[1:] if argv is None else argv
    console.open_streams()
    try:
        with announce_failure(), _report_run_errors(script.parser):
            with redirect_stdout(sys.stdout if is_first_process() else StringIO()):  # --help, once
                flags, saved = read_settings(script, argv)
            processes = count_processes(flags.use_gpu, flags.gpu)
            if launch_workers(file, argv, processes=processes, flags=flags):
                return
            choose_algorithms(flags.deterministic)
            device = choose_device(flags.use_gpu, flags.gpu, flags.threads, local_rank())
            with init_processes(device, flags.dist_backend) as world:
                if not world.is_first:
                    console.mute()
                check_agreement(world, saved and saved["step"])
                step = saved["step"] if saved else 0
                find = partial(find_run_dir, flags.run_dir, flags.resume, step)
                run_dir = None if flags.evaluate else world.on_rank0(find)
                run(RunContext(flags, saved, world, device, run_dir))
    finally:
        console.flush_streams()


@contextmanager
def _report_run_errors(parser: Parser) -> Iterator[None]:
    """Turn expected errors into one line and an exit code; let the others pass."""
    try:
        with report_errors(parser):
            try:
                yield
            except BadImage as error:
                remedy = "--on-bad-image skip leaves such images out"
                raise DataError(f"{error}; {remedy}") from error
    except TrainingDiverged as error:
        parser.error(f"training diverged at {error}; try a lower --lr", 1)
    except PeerFailed:
        wait_for_first_error()
        parser.error("another process has failed", 1)
    except RuntimeError as error:
        name, is_missing, _ = str(error).partition(" does not have a deterministic implementation")
        if is_missing:
            reason = "has no deterministic implementation; train without this flag"
            parser.error(f"--deterministic: {name} {reason}")
        if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise  # not about the communication of processes
        wait_for_first_error()
        parser.error(f"lost the connection to another process ({str(error).splitlines()[0]})", 1)
