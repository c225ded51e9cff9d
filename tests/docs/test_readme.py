"""Check that the verdict table of the README is the one that a study prints."""

import io
import json
from pathlib import Path

from rich.console import Console

from analysis.io import formats

ROOT = Path(__file__).parents[2]


def printed(verdict: dict) -> str:
    """Return what a sweep prints of a verdict on a terminal of 80 columns."""
    out = io.StringIO()
    Console(width=80, file=out).print(formats.verdict_table(verdict["comparisons"], verdict["summary"], 80))
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def test_the_verdict_of_the_readme_is_printed_from_a_published_study():
    verdict = json.loads((ROOT / "docs" / "results" / "laptop-wikitext-2" / "verdict.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert f"```text\n{printed(verdict)}```" in readme
    verdict["comparisons"][0]["improvement_low"] += 0.01
    assert printed(verdict) not in readme
