"""Test that the first line of a verdict names what makes it firm or weak: seeds, margin, floor, chosen values."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.io.assemble import assemble
from analysis.io.study import load
from analysis.io.text import markdown
from analysis.report import build
from analysis.verdict.decide import decide

RESULTS = Path(__file__).parents[3] / "docs" / "results"
ARMS = {"gelu": {"baseline": True}, "lin": {"floor": True}, "a": {"alpha": {"search": {"uniform": [0, 2]}}}}
NUISANCE = {"lr": {"loguniform": [1e-4, 1e-1]}, "weight_decay": {"loguniform": [1e-3, 1]}}


def shaped(mean, sd, n, seed):
    x = np.random.default_rng(seed).normal(size=n)
    return mean + sd * (x - x.mean()) / x.std(ddof=1)


def study(n=8, effect=0.02, gap=0.12, noise=0.004, floor_noise=None, arms=ARMS, **confirm):
    """Make a study with exact mean differences in nats; the baseline's mean loss is 3."""
    base = 3 + shaped(0, 0.01, n, 0)
    losses = {
        "gelu": base,
        "lin": base + shaped(gap, floor_noise or noise, n, 1),
        "a": base - shaped(effect, noise, n, 2),
    }
    rows = [
        {"stage": "confirm", "arm": arm, "seed": 101 + i, "config_key": arm, "test_nll": x, "outcome": "completed"}
        | {"lr": 0.004, "weight_decay": 0.1, "alpha": 1.25 if arm == "a" else np.nan}
        for arm in arms
        for i, x in enumerate(losses[arm])
    ]
    settings = {"arms": arms, "nuisance": NUISANCE, "confirm": {"seeds": n, **confirm}}
    return assemble("x", "x", pd.DataFrame(rows), pd.DataFrame(), settings)


def test_the_first_line_has_seeds_margin_floor_and_all_chosen_values():
    said = decide(study()).summary
    assert said.startswith(
        "With 8 seeds (a claim needs 8), against gelu (lr 0.004, weight_decay 0.1), on test_nll: a: better, beyond the "
        "margin of 0.5% (+0.67% ["
    )
    assert ", n = 8, lr 0.004, weight_decay 0.1, alpha 1.25). The floor lin loses by 4.00% [" in said
    assert said.endswith("], more than the 3% that ranking arms needs.")


def test_few_seeds_a_small_effect_and_a_small_gap_are_said_before_they_are_taken_for_more():
    said = decide(study(n=6, effect=0.012, gap=0.06)).summary
    assert said.startswith("Preliminary, with 6 of the 8 seeds that a claim needs, against gelu ")
    assert "a: better, but inside the margin of 0.5% (+0.40% [" in said
    assert "The floor lin loses by 2.00% [" in said
    assert said.endswith("], less than the 3% that ranking arms needs.")
    worse = decide(study(effect=-0.012)).summary
    assert "a: worse, but inside the margin of 0.5% (-0.40% [" in worse


def test_the_margin_is_in_its_own_unit_and_only_of_arms_that_differ():
    assert "better, beyond the margin of 0.01 nats" in decide(study(margin=0.01)).summary
    undecided = decide(study(effect=0.003, noise=0.02)).summary
    assert "a: undecided (+0.10% [" in undecided
    assert "margin" not in undecided
    assert undecided.count("needs about") == 1
    equal = decide(study(effect=0.0001)).summary
    assert "a: no difference larger than 0.5% (" in equal


def test_a_sequential_rule_names_its_seeds_as_its_own():
    confirm = {"rule": "obrien-fleming", "max_seeds": 10, "seeds": None}
    said = decide(study(n=10, **confirm)).summary
    assert said.startswith("With 10 seeds by the rule obrien-fleming, against gelu ")


def test_a_study_without_a_floor_says_so():
    said = decide(study(arms={key: options for key, options in ARMS.items() if key != "lin"})).summary
    assert said.endswith("No floor was run, so nothing shows that this regime can tell arms apart.")


@pytest.mark.parametrize(
    ("gap", "noise", "too_few"),
    [
        (0.001, 0.004, False),  # [-0.08, +0.14]%: a gap of 0.5% is excluded
        (-0.02, 0.004, False),
        (0.01, 0.06, True),  # [-1.3, +2.0]%: nothing is excluded
        (0.005, 0.02, True),  # [-0.4, +0.7]%
        (-0.1, 0.4, True),
    ],
)
def test_too_few_seeds_and_a_regime_that_cannot_tell_are_different_verdicts(gap, noise, too_few):
    result = decide(study(gap=gap, floor_noise=noise))
    (row,) = result.in_question
    assert row.kind == "not_testable"
    assert result.sensitivity.too_few_seeds is too_few
    assert row.refusal == ("too_few_seeds" if too_few else "floor_does_not_lose")
    said = "too few seeds to tell the floor from gelu" if too_few else "this regime cannot tell a linear MLP from GELU"
    assert row.verdict == f"not testable: {said}"
    assert result.summary.startswith(f"Not testable: {said}: lin is {gap / 3 * 100:+.2f}% [")
    assert f"above the margin of 0.5% is {'not ' if too_few else ''}excluded" in result.summary
    assert "Chosen: gelu: lr 0.004, weight_decay 0.1; " in result.summary
    assert "a: lr 0.004, weight_decay 0.1, alpha 1.25." in result.summary


def test_a_floor_that_diverges_has_lost():
    table = study()
    lost = (table.trials["arm"] == "lin") & (table.trials["seed"] < 108)
    table.trials.loc[lost, "test_nll"] = np.inf
    table.trials.loc[lost, "outcome"] = "infeasible"
    result = decide(table)
    assert (result.sensitivity.testable, result.in_question[0].kind) == (True, "better")
    assert "Floor: lin is worse by ranks, because a run diverged (n = 8)." in result.summary


def test_every_place_shows_the_same_first_line():
    found = load(RESULTS / "quick-builtin")
    result = decide(found)
    assert result.summary.startswith("Preliminary, with 6 of the 8 seeds that a claim needs, against gelu (lr ")
    assert ", alpha 1.3" in result.summary
    assert build.terminal_table(result).title.plain == result.summary
    assert f"**{markdown(result.summary)}**" in build.verdict_markdown(result)
