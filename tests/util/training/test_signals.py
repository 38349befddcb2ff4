import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from util import console
from util.errors import Stopped
from util.training.signals import heed_signals, tell_where_to_continue


def test_a_signal_is_a_wish_and_the_handlers_of_before_come_back(capfd):
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        with heed_signals() as stop_request:
            assert stop_request() == 0
            os.kill(os.getpid(), number)
            assert stop_request() == number
        assert f"{number.name}: stopping after this step" in capfd.readouterr().err
        assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_an_interrupt_after_another_signal_ends_the_process_at_once(first):
    code = (
        "import os, signal; from util.training.signals import heed_signals\n"
        "with heed_signals() as stop_request:\n"
        f"    os.kill(os.getpid(), signal.{first}); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop_request(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('alive')"
    )
    root = str(Path(__file__).resolve().parents[3])
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert end.returncode == -signal.SIGINT
    assert end.stdout == f"{int(getattr(signal, first))}\n"


def test_a_hangup_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with heed_signals() as stop_request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop_request() == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def wait_for_a_wish(run_dir):
    """Only in a child, which never returns: end as a run does."""
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    code = 1
    try:
        with tell_where_to_continue(run_dir), heed_signals() as stop_request:
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


def test_a_run_whose_terminal_is_gone_ends_in_order(tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        wait_for_a_wish(tmp_path)
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)  # the system sends SIGHUP
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP


def test_who_is_stopped_by_the_wish_of_another_was_asked_to_end():
    assert (Stopped(0).number, str(Stopped(signal.SIGINT))) == (signal.SIGTERM, "SIGINT")
