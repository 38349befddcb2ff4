import multiprocessing
import os
import signal

import pytest

from util.lock import LockHeld, take_lock

fork = multiprocessing.get_context("fork")


def own(path, ready, end):
    with take_lock(path):
        ready.set()
        end.wait(20)


@pytest.mark.parametrize("killed", [True, False])
def test_a_lock_has_one_owner_until_that_ends(tmp_path, killed):
    path, ready, end = tmp_path / "lock", fork.Event(), fork.Event()
    owner = fork.Process(target=own, args=(path, ready, end))
    owner.start()
    assert ready.wait(20)
    with pytest.raises(LockHeld, match=f"process {owner.pid} on "):
        take_lock(path)
    told = []

    def wait(text):
        told.append(text)
        os.kill(owner.pid, signal.SIGKILL) if killed else end.set()

    with take_lock(path, wait):
        assert f"process {os.getpid()} on " in path.read_text()
    owner.join()
    assert len(told) == 1 and f"process {owner.pid} on " in told[0]
