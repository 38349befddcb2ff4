"""scripts/bench/messages.py: message sizes against the messages of a layer."""

import pytest
import torch
from torch import distributed

from deconv import Delinear, FastDeconv
from deconv.sync import BatchShare
from scripts.bench import messages


@pytest.mark.parametrize(
    "layer",
    [
        FastDeconv(32, 8, 3),
        FastDeconv(32, 8, 3, mode=1, shared=False),
        FastDeconv(32, 8, 3, mode=3, groups=2),
        Delinear(32, 4, block=16),
    ],
    ids=["joint", "separable", "channels", "linear"],
)
def test_sizes_equal_those_of_the_sent_messages(monkeypatch, layer):
    sent = []
    monkeypatch.setattr(
        distributed, "all_reduce", lambda message, group: sent.append(message.numel())
    )
    monkeypatch.setattr("deconv.whitening.find_share", lambda group: BatchShare(group, (0, 4)))
    shape = (4, 32, 8, 8) if isinstance(layer, FastDeconv) else (4, 32)
    out = layer(torch.randn(shape, requires_grad=True))
    sizes = messages.message_sizes(layer)
    assert sent == sizes
    out.sum().backward()
    assert sorted(sent) == sorted(2 * sizes)


def test_the_table_has_a_row_for_each_network(capsys):
    messages.main(["vgg11:16", "resnet18d:64"])
    *_, small, large = capsys.readouterr().out.splitlines()
    assert small == "| vgg11 | 16 | 36.9 MB | 3.6 MB | 10 % | 18 | 0.4 MB |"
    assert large.startswith("| resnet18d | 64 | 46.7 MB | 43.3 MB | 93 % | 42 |")


def test_wrong_names_are_refused(capsys):
    for name in ("vgg11", "vgg12:16"):
        with pytest.raises(SystemExit) as stop:
            messages.main([name])
        assert stop.value.code == 2 and name.split(":")[0] in capsys.readouterr().err
