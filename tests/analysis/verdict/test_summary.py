"""Test that the first line of a verdict names what makes it firm or weak: seeds, margin, floor, chosen values."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.io.assemble import assemble
from analysis.io.study import load
from analysis.io.text import markdown
from analysis.report import build
from analysis.stats import power
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
    said = decide(study(n=6, effect=0.009, noise=0.002, gap=0.06)).summary
    assert said.startswith("Preliminary, with 6 of the 8 seeds that a claim needs, against gelu ")
    assert "a: better, but inside the margin of 0.5% (+0.30% [" in said
    assert "The floor lin loses by 2.00% [" in said
    assert said.endswith("], less than the 3% that ranking arms needs.")
    worse = decide(study(effect=-0.009, noise=0.002)).summary
    assert "a: worse, but inside the margin of 0.5% (-0.30% [" in worse


def test_an_effect_is_beyond_or_inside_the_margin_only_if_its_interval_is():
    for sign, word in ((1, "better"), (-1, "worse")):
        for effect, said in ((0.009, ", but inside"), (0.014, ", open whether beyond"), (0.02, ", beyond")):
            result = decide(study(effect=sign * effect))
            (row,) = result.in_question
            assert f"a: {word}{said} the margin of 0.5% (" in result.summary
            nearer = row.selected_low if sign > 0 else -row.selected_high
            assert (nearer > 0.5) is (said == ", beyond")
            assert (row.p_tost_adjusted <= 0.05) is (said == ", but inside")
    (row,) = decide(study(effect=0.0185)).in_question  # one arm alone is beyond, but not after selection
    assert row.improvement_low > 0.5 > row.selected_low
    assert "open whether beyond" in decide(study(effect=0.0185)).summary


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
    assert result.summary.startswith(f"Not testable: {said}: lin is {abs(gap) / 3 * 100:+.2f}% [")
    assert f"] {'worse' if gap > 0 else 'better'} than gelu (n = 8), " in result.summary
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


EARLY = np.array([0.0100, 0.0101, 0.0102, 0.0099, 0.0100, 0.0101])


def looked_at(confirm, looks=None, **differences):
    """Make a study of known differences in nats, in the order of its seeds; `looks` are their numbers of seeds."""
    rows = []
    for i in range(len(next(iter(differences.values())))):
        for arm, d in {"gelu": None, **differences}.items():
            row = {"stage": "confirm", "arm": arm, "seed": 101 + i, "config_key": "k", "outcome": "completed"}
            row["test_nll"] = 3 + 0.01 * np.sin(i) - (0 if d is None else d[i])
            rows.append(row | ({"look": next(n for n in looks if n > i)} if looks else {}))
    arms = {"gelu": {"baseline": True}, **{arm: {"floor": arm == "lin"} for arm in differences}}
    return assemble("s", "s", pd.DataFrame(rows), pd.DataFrame(), {"name": "s", "arms": arms, "confirm": confirm})


def test_a_decision_keeps_the_direction_of_the_look_that_made_it():
    reserve = {"rule": "fixed", "seeds": 20, "reserve": 0.2}
    turned = np.concatenate([EARLY, np.linspace(-0.03, -0.02, 14)])
    for confirm, looks, n in ((reserve, (6, 20), 6), ({"rule": "e-process", "racing": False}, None, 6)):
        result = decide(looked_at(confirm, looks, a=turned))
        (row,) = result.comparisons
        assert (row.kind, row.mean_difference < 0) == ("better", True)
        assert row.path[-1]["direction"] == 1
        assert f"decided at its look at {n} seeds" in row.why
        assert (
            f"better by its look at {n} seeds, though the mean over all of them points the other way" in result.summary
        )
        assert decide(looked_at(confirm, looks, a=-turned)).comparisons[0].kind == "worse"
    alone = decide(looked_at({"seeds": 20}, None, a=turned)).comparisons[0]
    assert alone.kind == "worse"  # one look: all seeds decide


def test_a_floor_that_lost_at_an_earlier_look_has_lost():
    later = np.array([0.05, -0.05, 0.03, -0.03, 0.05, -0.05, 0.02, -0.02, 0.05, -0.05, 0.04, -0.04, 0.05, -0.05])
    found = {"lin": np.concatenate([-EARLY, later]), "a": np.random.default_rng(0).normal(0, 0.01, 20)}
    result = decide(looked_at({"seeds": 20, "reserve": 0.2}, (6, 20), **found))
    assert result.sensitivity.testable
    assert result.sensitivity.gap_low < 0
    assert "Floor: lin was worse than gelu at an earlier look, which decides (n = 20)." in result.summary
    assert decide(looked_at({"seeds": 20}, None, **found)).sensitivity.testable is False


def test_many_looks_without_a_reserve_are_not_said_to_err_more_often_than_is_known():
    first = decide(looked_at({"seeds": 8}, (6, 8), a=[*EARLY, 0.01, 0.011])).summary
    assert "looks at 6 and 8 seeds, up to 10% of studies without a difference say better or worse." in first
    every = decide(looked_at({"seeds": 28}, tuple(range(8, 29)), a=np.resize(EARLY, 28))).summary
    assert " and 28 seeds, more than 5% of studies without a difference say better or worse." in every


def test_added_seeds_outside_the_bound_of_a_reserve_are_said():
    draw, said = (
        np.random.default_rng(1).normal(0, 0.01, 20),
        "Numbers that were chosen by the results may err slightly",
    )
    kept, one = {"seeds": 20, "reserve": 0.2}, {"a": draw}
    assert said not in decide(looked_at(kept, (8, 20), **one)).summary
    few = decide(looked_at(kept, (6, 20), **one)).summary
    assert f"{said} more often: the first look had 6 seeds (the bound asks for 8), and the family has 1 comp" in few
    assert said not in decide(looked_at({"seeds": 6, "reserve": 0.2}, a=draw[:6])).summary  # nothing was added
    for arms, level, wanted in ((16, 0.05, False), (17, 0.05, True), (3, 0.01, False), (4, 0.01, True)):
        many = {f"a{i}": draw + 0.001 * i for i in range(arms)}
        assert (said in decide(looked_at(kept | {"level": level}, (8, 20), **many)).summary) == wanted


def test_why_says_how_much_too_large_found_effects_are_at_the_level_of_a_single_look():
    draw = np.concatenate([shaped(0.012, 0.011, 8, 4), shaped(0.012, 0.011, 12, 5)])
    (plain,) = decide(looked_at({"seeds": 8}, a=draw[:8])).comparisons
    (kept,) = decide(looked_at({"seeds": 8, "reserve": 0.2}, a=draw[:8])).comparisons
    (later,) = decide(looked_at({"seeds": 20, "reserve": 0.2}, (8, 20), a=draw)).comparisons
    assert {row.kind for row in (plain, kept, later)} == {"better"}
    assert plain.exaggeration == pytest.approx(power.exaggeration(plain.t, 7, 0.05))
    assert kept.exaggeration == pytest.approx(power.exaggeration(kept.t, 7, 0.04))
    assert 1.01 < plain.exaggeration < kept.exaggeration
    assert f"on average {kept.exaggeration:.2f} times too large" in kept.why
    assert later.exaggeration is None  # no formula for several looks


@pytest.mark.parametrize("lost", ["a", "gelu"])
def test_an_arm_of_infeasible_runs_only_is_named_first_with_the_reason(lost):
    given = study(n=4)
    bad = given.trials["arm"] == lost
    given.trials.loc[bad, ["outcome", "reason", "test_nll"]] = ["infeasible", "test_nll is nan", np.nan]
    result = decide(given)
    assert result.summary.startswith(f"All 4 runs of {lost} are infeasible: test_nll is nan. ")
    row = next(row for row in result.comparisons if row.arm == "a")
    if lost == "a":
        assert row.verdict.startswith("undecided (all 4 runs of a are infeasible; needs about ")
    given.trials.loc[bad & (given.trials["seed"] == 101), ["outcome", "test_nll"]] = ["completed", 3.0]
    assert "infeasible" not in decide(given).summary
