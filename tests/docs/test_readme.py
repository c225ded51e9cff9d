"""Check that the verdict table of the README is the one that a study prints."""

import io
from pathlib import Path

from rich.console import Console

from analysis.io.study import load
from analysis.report import build
from analysis.verdict.decide import decide
from analysis.verdict.kinds import Result

ROOT = Path(__file__).parents[2]


def printed(result: Result) -> str:
    """Return what a sweep prints of a verdict on a terminal of 80 columns."""
    out = io.StringIO()
    Console(width=80, file=out).print(build.terminal_table(result, 80))
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def test_the_verdict_of_the_readme_is_printed_from_a_published_study():
    result = decide(load(ROOT / "docs" / "results" / "laptop-wikitext-2"))
    readme = (ROOT / "README.md").read_text()
    assert f"```text\n{printed(result)}```" in readme
    result.comparisons[0].improvement_low += 0.01
    assert printed(result) not in readme
