"""Check that the table of noise in docs/plan.md is that of the published studies, and that the plan names the page."""

import importlib.util
import math
from pathlib import Path

import pandas as pd
import pytest

from tune.plan import page

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("make_plan", ROOT / "docs" / "make_plan.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)
PAGE = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")


def test_the_table_is_that_of_the_published_studies():
    assert make.page(PAGE) == PAGE, "stale: run `python docs/make_plan.py`"


@pytest.mark.parametrize("name", ["quick-builtin", "laptop-wikitext-2"])
def test_the_noise_is_the_pooled_spread_of_paired_differences(name):
    trials = pd.read_parquet(ROOT / "docs" / "results" / name / "trials.parquet")
    losses = trials[trials.stage == "confirm"].pivot(index="seed", columns="arm", values="test_nll")
    others = losses.drop(columns=["gelu", "linear-floor"])
    spread = others.sub(losses["gelu"], axis=0).std(ddof=1) / losses["gelu"].mean()
    (line,) = [line for line in make.table().splitlines() if line.startswith(f"| [{name}]")]
    assert f"| {math.sqrt((spread**2).mean()):.2%} |" in line
    assert f"| {spread.min():.2%} ({spread.idxmin()}) | {spread.max():.2%} ({spread.idxmax()}) |" in line


def test_a_table_of_other_figures_is_stale():
    wrong = PAGE.replace("| 0.77% |", "| 0.07% |")
    assert wrong != PAGE
    assert make.page(wrong) == PAGE


def test_a_plan_without_noise_points_to_the_page():
    assert "docs/plan.md lists the noise" in "\n".join(page._power(None, None))
