"""Shared fixture: a simulated study folder."""

from pathlib import Path

import pytest

from tests.analysis.helpers import simulate


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """Return the folder of a study with the gaps of `helpers.GAPS`."""
    return simulate(tmp_path / "demo")
