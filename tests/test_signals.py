import os
import signal
import subprocess
import sys

import pytest

from util.signals import Stopped, heed_signals


def test_a_signal_is_a_wish_and_the_handlers_of_before_come_back(capfd):
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        with heed_signals() as wish:
            assert wish() == 0
            os.kill(os.getpid(), number)
            assert wish() == number
        assert f"{number.name}: stopping after this step" in capfd.readouterr().err
        assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT"])
def test_an_interrupt_after_another_signal_ends_the_process_at_once(first):
    code = (
        "import os, signal; from util.signals import heed_signals\n"
        "with heed_signals() as wish:\n"
        f"    os.kill(os.getpid(), signal.{first}); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(wish(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('alive')"
    )
    root = os.path.dirname(os.path.dirname(__file__))
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert end.returncode == -signal.SIGINT
    assert end.stdout == f"{int(getattr(signal, first))}\n"


def test_who_is_stopped_by_the_wish_of_another_was_asked_to_end():
    assert (Stopped(0).number, str(Stopped(signal.SIGINT))) == (signal.SIGTERM, "SIGINT")
