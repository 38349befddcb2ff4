"""Loss curves are the recorded ones; those changed on purpose: python scripts/golden.py."""

import pytest
import torch

from scripts import golden

TOLERANCE = 1e-6  # relative; two threads were seen to change 14 losses of VGG-11 by up to 1e-11
RECORDED = sorted(path.stem for path in golden.FOLDER.glob("*.txt"))


def compare(arch, kind, steps, threads=1):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = list(golden.losses(arch, kind, steps))
    finally:
        torch.set_num_threads(before)
    recorded = golden.read_curves(arch)[kind]
    assert found == pytest.approx(recorded[:steps], rel=TOLERANCE)


@pytest.mark.parametrize("arch", RECORDED)
def test_the_first_steps_are_the_recorded_ones(arch):
    """Of one kind of layers for each network, in turn."""
    kinds = list(golden.kinds_of(arch))
    compare(arch, kinds[RECORDED.index(arch) % len(kinds)], steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("arch", golden.list_networks())
def test_whole_curves_are_the_recorded_ones(arch, threads):
    for kind in golden.kinds_of(arch):
        compare(arch, kind, golden.STEPS, threads)


def test_another_learning_rate_is_noticed(monkeypatch):
    """As any change of what is computed."""
    build = golden.build_optimizer
    double = lambda *args, lr, **more: build(*args, lr=2 * lr, **more)
    monkeypatch.setattr(golden, "build_optimizer", double)
    with pytest.raises(AssertionError):
        compare("simple_v2", "mode5", golden.STEPS)
