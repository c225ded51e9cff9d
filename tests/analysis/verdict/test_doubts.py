"""Test that the sentence of a verdict names what weakens it."""

from dataclasses import replace
from pathlib import Path

import pytest

from analysis.io.study import load
from analysis.verdict.decide import decide
from analysis.verdict.kinds import Verdict
from analysis.verdict.words import doubts

RESULTS = Path(__file__).parents[3] / "docs" / "results"


@pytest.fixture(scope="module")
def quick():
    """Return the verdict of a published study with 6 seeds and a floor that loses by 2.75%."""
    return decide(load(RESULTS / "quick-builtin"))


def test_few_seeds_and_a_small_gap_of_the_floor_are_said(quick):
    floor = "linear-floor loses by 2.75%, and ranking arms needs 3%."
    assert doubts(quick) == f"Preliminary: 6 seeds, and a claim needs 8. {floor}"
    assert doubts(replace(quick, rule="e-process")) == floor  # its number of seeds is part of the rule
    strong = replace(quick, sensitivity=replace(quick.sensitivity, strong=True))
    assert doubts(strong) == "Preliminary: 6 seeds, and a claim needs 8."


def test_a_difference_below_the_margin_is_said_of_the_arms_that_have_it(quick):
    assert doubts(decide(load(RESULTS / "laptop-wikitext-2"))) == "Smaller than the margin of 0.5%: paglu-searched."
    assert doubts(decide(load(RESULTS / "laptop-wikitext-2-frozen"))) == ""
    rows = [replace(row, margin=1.0) for row in quick.comparisons]
    said = doubts(replace(quick, comparisons=rows, margin=1.0))
    assert "Smaller than the margin of 1.0 nats: paglu-learnable, paglu-per-layer." in said


def test_nothing_is_said_if_no_arm_is_better_or_worse(quick):
    rows = [replace(row, kind=Verdict.UNDECIDED) for row in quick.comparisons]
    assert doubts(replace(quick, comparisons=rows)) == ""
