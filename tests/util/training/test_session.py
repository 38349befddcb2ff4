"""End of a session: exit codes, and the command that continues the run."""

import signal
from argparse import Namespace

import pytest

from util.errors import Stopped
from util.training.session import exit_when_stopped, format_data_flag


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("stop", "code"),
    [(KeyboardInterrupt(), 130), (Stopped(signal.SIGINT), 130), (Stopped(signal.SIGTERM), 143)],
)
def test_an_interrupt_names_the_last_checkpoint(tmp_path, capsys, finished, stop, code):
    if finished:
        (tmp_path / "checkpoint.pth.tar").touch()
    with pytest.raises(SystemExit) as end, exit_when_stopped(tmp_path):
        raise stop
    assert end.value.code == code
    message = capsys.readouterr().err.strip()
    expected = f"--resume {tmp_path / 'checkpoint.pth.tar'}" if finished else "no checkpoint was"
    assert expected in message and "\n" not in message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dataset": "digits", "data": "./data"}, ""),
        ({"dataset": "folder", "data": "my images"}, "--data 'my images'"),
        ({"data": "big"}, "big"),
        ({"data": None}, ""),
    ],
)
def test_the_flag_of_the_images_can_be_typed(given, words):
    """digits refuse --data; the folder of ImageNet has no flag."""
    assert format_data_flag(Namespace(**given)) == words
