"""The benchmark of looks: somebody follows the advice until it ends, and racing saves trials."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")


@pytest.fixture(scope="module")
def looks():
    """Return the benchmark, whose folder is not a package."""
    sys.path.insert(0, BENCHMARKS)
    import looks

    yield looks
    sys.path.remove(BENCHMARKS)


def test_advice_is_followed_until_none_is_left(looks, monkeypatch):
    monkeypatch.setattr(looks.paired_tests, "EXACT_UP_TO", 10)
    monkeypatch.setattr(looks.paired_tests, "DRAWS", 10)
    found = looks.advised(["first"], {"seeds": 6, "reserve": 0.2, "margin": "0.1%"}, range(50_000, 50_003))
    assert found["shown"] > 1  # at least one study was extended
    assert found["ever"] >= found["first"]


def test_racing_trains_no_more_than_all_arms_together(looks):
    gaps, margin = looks.EFFECTS["mixed differences"]
    mine, together, before = looks.raced("e-process", gaps, margin, range(3))["cells"]
    assert mine < 0.7 * before
    assert mine < together <= before
