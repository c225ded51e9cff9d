"""The benchmark of racing: the same decisions with fewer trials."""

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


def test_racing_trains_no_more_than_all_arms_together(looks):
    gaps, margin = looks.EFFECTS["mixed differences"]
    mine, together, before = looks.raced("e-process", gaps, margin, range(3))["cells"]
    assert mine < 0.7 * before
    assert mine < together <= before
