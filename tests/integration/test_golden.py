"""Loss curves equal the recorded ones.

After an intended change of numerics, record them again: python scripts/dev/record_golden.py.
"""

from itertools import product

import pytest
import torch

from scripts.dev import record_golden

TOLERANCE = 1e-6  # relative; a rounding of the images moves no recorded loss by 1e-10
RECORDED = sorted(path.stem for path in record_golden.FOLDER.glob("*.txt"))
LARGE = ("vgg11d", "vgg16d")  # over a hundred million weights


def compare(arch, kind, steps=record_golden.STEPS, threads=1, faster=1):
    recorded = record_golden.read_curves(arch)[kind]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = list(record_golden.losses(arch, kind, faster * recorded.rate, steps))
    finally:
        torch.set_num_threads(before)
    assert found == pytest.approx(recorded.losses[:steps], rel=TOLERANCE)


@pytest.mark.parametrize("arch", [arch for arch in RECORDED if arch not in LARGE])
def test_the_first_steps_are_the_recorded_ones(arch):
    """Compare one kind of layers per network, the kinds in turn."""
    kinds = list(record_golden.kinds_of(arch))
    compare(arch, kinds[RECORDED.index(arch) % len(kinds)], steps=2)


@pytest.mark.parametrize("kind", record_golden.OPTIMIZERS)
def test_other_optimizers_take_the_recorded_steps(kind):
    compare(record_golden.SMALL, kind, steps=5)


@pytest.mark.slow
@pytest.mark.parametrize("arch", record_golden.list_networks())
def test_whole_curves_are_the_recorded_ones(arch):
    for kind, threads in product(record_golden.kinds_of(arch), (1, 2)):
        compare(arch, kind, threads=threads)


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        ("simple_v2", "mode5"),
        pytest.param("pnasnetB", "mode1", marks=pytest.mark.slow),
        pytest.param("resnet101d", "bn", marks=pytest.mark.slow),
    ],
)
def test_another_learning_rate_is_noticed(arch, kind):
    """Double the learning rate of three curves, two of them with the lowest rate of all."""
    with pytest.raises(AssertionError):
        compare(arch, kind, faster=2)
