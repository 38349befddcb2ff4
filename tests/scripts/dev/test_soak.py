"""scripts/dev/soak.py: growth of resource use is reported, and a run shows none."""

import pytest

from scripts.dev import soak
from scripts.dev.soak import Sample


def parts_of(**growth):
    """Return the parts of a run whose resource use grows by the given amount per step."""
    by = {"seconds": 0.0, "resident": 0.0, "files": 0} | growth
    samples, now = [], 0.0
    for step in range(100):
        now += 0.01 + step * by["seconds"]
        samples.append(Sample(now, 200 + step * by["resident"], 10 + int(step * by["files"])))
    return soak.summarize(samples, 5)


def test_the_table_has_the_run_in_equal_parts():
    parts = parts_of(resident=1)
    assert [part.step for part in parts] == [20, 40, 60, 80, 100]
    assert parts[-1] == (100, pytest.approx(10), 299, 10)
    assert soak.find_growth(parts_of()) is None


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        ({"seconds": 1e-4}, "milliseconds grew"),
        ({"resident": 0.1}, "MiB grew from 203.9 to 209.9"),
        ({"files": 0.1}, "files grew from 13.0 to 19.0"),
    ],
)
def test_growth_is_reported(growth, message):
    assert soak.find_growth(parts_of(**growth)).startswith(message)


def test_the_table_of_a_run_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(soak, "LIMITS", {"files": 1.5})  # too short for the other limits
    soak.main(["--steps", "9", "--rows", "3", "--", "--arch", "simple_v1", "--msg", "True"])
    output = capsys.readouterr().out
    assert output.count("epoch 1 batch ") == 9
    assert [row.split("|")[1].strip() for row in output.splitlines()[-4:]] == [
        "step",
        "3",
        "6",
        "9",
    ]


@pytest.mark.slow
def test_nothing_grows_in_two_thousand_steps():
    soak.main(["--", "--arch", "mlp", "--method", "4"])
