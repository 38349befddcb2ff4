import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from util import console
from util.errors import Stopped
from util.training.session import exit_when_stopped
from util.training.signals import stop_on_signal

PATIENCE = 60  # seconds, at most, for every wait


def test_a_signal_becomes_a_stop_request_and_the_handlers_come_back(capfd):
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        with stop_on_signal() as stop_request:
            assert stop_request() == 0
            os.kill(os.getpid(), number)
            assert stop_request() == number
        assert f"{number.name}: stopping after this step" in capfd.readouterr().err
        assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_an_interrupt_after_another_signal_ends_the_process_at_once(first):
    code = (
        "import os, signal; from util.training.signals import stop_on_signal\n"
        "with stop_on_signal() as stop_request:\n"
        f"    os.kill(os.getpid(), signal.{first}); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop_request(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('alive')"
    )
    root = str(Path(__file__).resolve().parents[3])
    options = {"capture_output": True, "text": True, "cwd": root, "timeout": PATIENCE}
    end = subprocess.run([sys.executable, "-c", code], **options)
    assert end.returncode == -signal.SIGINT
    assert end.stdout == f"{int(getattr(signal, first))}\n"


def test_a_hangup_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal() as stop_request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop_request() == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def run_until_stopped(run_dir):
    """End as a run does after a stop request; only in a child, which never returns."""
    code = 1
    try:
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        signal.alarm(PATIENCE)  # kills this process, should no signal arrive
        with exit_when_stopped(run_dir), stop_on_signal() as stop_request:
            os.write(1, b"ready")
            while not stop_request():
                time.sleep(0.01)
            console.print_line("nobody reads this")
            raise Stopped(stop_request())
    except SystemExit as end:
        console.flush_streams()
        code = end.code
    finally:
        os._exit(code)


def test_a_run_whose_terminal_is_gone_exits_in_order(tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        run_until_stopped(tmp_path)
    try:
        assert select.select([terminal], [], [], PATIENCE)[0], "the child does not start"
        assert os.read(terminal, 5) == b"ready"
    finally:
        os.close(terminal)  # the system sends SIGHUP
        status = wait_for_exit(pid)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP


def wait_for_exit(pid):
    """Return the status of a child; kill a child that does not exit in time."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def test_a_process_stopped_by_another_ends_as_after_sigterm():
    assert (Stopped(0).number, str(Stopped(signal.SIGINT))) == (signal.SIGTERM, "SIGINT")
