"""Rules that add seeds: decisions equal to their boundaries, error rates by simulation, and the verdict's wording."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.io.assemble import assemble
from analysis.io.files import TableError
from analysis.stats import sequential
from analysis.stats.pairs import differences
from analysis.stats.sequential import NOMINAL, e_process, next_seeds, nominal, path, plan, shares, undecided
from analysis.verdict.decide import verdict

OBF = plan("obrien-fleming")
E = plan("e-process")


def test_the_looks_of_each_rule():
    assert OBF == (3, 5, 8, 10)
    assert plan("obrien-fleming", 20) == (6, 10, 16, 20)
    assert (E[0], E[-1], len(E)) == (3, 20, 18)
    with pytest.raises(ValueError, match="rule 'pocock'; allowed: obrien-fleming, e-process"):
        plan("pocock")
    with pytest.raises(ValueError, match="cap of 2 seeds; allowed: 3 to 100"):
        plan("e-process", 2)


def of_p(n: int, p: float) -> np.ndarray:
    """Return differences of n pairs whose paired t test has this p."""
    x = np.random.default_rng(n).standard_normal(n)
    x = (x - x.mean()) / x.std(ddof=1)
    return x + stats.t.isf(p / 2, n - 1) / math.sqrt(n)


def test_obrien_fleming_stops_at_the_published_levels_and_not_above_them():
    for n, level in NOMINAL.items():
        for factor, stops in ((0.97, True), (1.03, False)):
            d = of_p(n, level * factor)
            row = path(d, "obrien-fleming", OBF, 0.05)[-1]
            assert stats.ttest_1samp(d, 0).pvalue == pytest.approx(row["p"])
            earlier = path(d, "obrien-fleming", OBF, 0.05)[:-1]
            if all(look["p"] > look["stops_at"] for look in earlier):
                assert (row["p_anytime"] <= 0.05) is stops, (n, factor, row)
            assert row["stops_at"] == level


def test_the_e_process_stops_where_e_reaches_one_over_the_level():
    d = np.random.default_rng(3).normal(0.8, 1, 20)
    rows, e = path(d, "e-process", E, 0.05), e_process(d)
    for row in rows:
        assert row["e"] == pytest.approx(e[row["n"] - 1])
        assert (row["p"] <= row["stops_at"]) == (row["e"] >= 20)  # the same decision, stated by p
    assert rows[-1]["p_anytime"] == pytest.approx(1 / max(e[2:]))
    assert nominal("e-process", E, 3, 1e-3) == 0.0  # three seeds can never reach e = 1000


def test_what_was_once_decided_stays_decided():
    d = np.concatenate([of_p(5, 0.001), [-3.0, -3.0, -3.0, -3.0, -3.0]])
    p = [row["p_anytime"] for row in path(d, "obrien-fleming", OBF, 0.05)]
    assert p[1] == p[2] == p[3] <= 0.05
    assert path(d, "obrien-fleming", OBF, 0.05)[-1]["p"] > 0.05


@pytest.mark.parametrize("rule", ["obrien-fleming", "e-process"])
def test_three_equal_arms_are_called_different_in_no_more_than_the_level(rule):
    looks = plan(rule)
    rng, studies, wrong = np.random.default_rng(1), 250, 0
    for _ in range(studies):
        baseline = rng.standard_normal(looks[-1])
        p = [path(baseline - rng.standard_normal(looks[-1]), rule, looks, 0.05)[-1]["p_anytime"] for _ in range(3)]
        wrong += min(p) <= 0.05 / 3  # Holm's first step rejects
    assert stats.binomtest(wrong, studies, 0.05, alternative="greater").pvalue > 0.01
    naive = rng.standard_normal((4000, 10))  # a t test at 0.05 at each look has a far higher error rate
    hits = np.any([stats.ttest_1samp(naive[:, :n], 0, axis=1).pvalue <= 0.05 for n in OBF], axis=0)
    assert hits.mean() > 0.1


def test_arms_that_have_stopped_are_no_longer_undecided():
    d = {"clear": of_p(5, 1e-6), "close": of_p(5, 0.004), "none": of_p(5, 0.5)}
    assert undecided(d, "obrien-fleming", OBF, 0.05, "none") == ["none"]
    assert undecided(d, "obrien-fleming", OBF, 0.05, "holm") == ["close", "none"]  # 0.004 is not enough for two arms
    assert undecided({arm: x[:2] for arm, x in d.items()}, "e-process", E, 0.05, "holm") == list(d)


def test_diverged_runs_and_missing_pairs():
    d = np.array([math.nan, 0.5, 0.6, 0.7, 0.65, 0.51, 0.61, 0.71, 0.64, 0.52])
    assert path(d, "obrien-fleming", OBF, 0.05)[0]["pairs"] == 2
    d[4] = -math.inf
    rows = path(d, "obrien-fleming", OBF, 0.05)
    assert rows[2]["t"] is None
    assert rows[2]["p"] == pytest.approx(stats.wilcoxon([0.5, 0.6, 0.7, -9, 0.51, 0.61, 0.71]).pvalue)
    e = path(d, "e-process", E, 0.05)
    assert [row["e"] is None for row in e[:4]] == [False, False, True, True]
    assert e[-1]["p_anytime"] == e[1]["p_anytime"]


def test_differences_of_diverged_and_missing_runs():
    inf, nan = math.inf, math.nan
    d = differences(np.array([3.0, inf, 3.0, inf, nan, 3.0]), np.array([2.0, 2.0, inf, inf, 2.0, nan]))
    np.testing.assert_array_equal(d, [1.0, inf, -inf, 0.0, nan, nan])


def test_a_reserve_is_spent_by_halves_and_never_whole():
    assert shares(0.2, 4) == pytest.approx([0.8, 0.1, 0.05, 0.025])
    assert sum(shares(0.2, 40)) == pytest.approx(1.0)
    assert shares(0.0, 3) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"reserve 0.3; allowed: 0 to 0.25"):
        shares(0.3, 2)


def test_the_fixed_rule_takes_the_smallest_p_per_share_and_without_a_reserve_the_last_p():
    d = np.concatenate([of_p(6, 0.03), [-0.5, 1.0, 0.2, -0.1]])
    p = [stats.ttest_1samp(d[:n], 0).pvalue for n in (6, 10)]
    assert p[0] / 0.8 < p[1] / 0.1
    kept = path(d, "fixed", (6, 10), 0.05, 0.2)
    assert [row["p_anytime"] for row in kept] == pytest.approx([p[0] / 0.8] * 2)  # a decision stays
    assert [row["stops_at"] for row in kept] == pytest.approx([0.04, 0.005])
    assert [row["p_anytime"] for row in path(d, "fixed", (6, 10), 0.05)] == pytest.approx(p)


def test_no_difference_over_the_looks_has_the_boundaries_of_the_rule_on_each_side():
    x = of_p(10, 0.5)
    error = x.std(ddof=1) / math.sqrt(10)
    margin = abs(x.mean()) + stats.t.isf(NOMINAL[10] / 2, 9) * error  # the nearer side is at the last boundary
    (*_, last) = path(x, "obrien-fleming", OBF, 0.05, margins=[1e-9, 1e-9, 1e-9, margin])
    assert last["p_no_difference"] == pytest.approx(0.025, rel=1e-3)
    assert last["p_tost"] == pytest.approx(NOMINAL[10] / 2, rel=1e-9)
    sides = [max(e for n, e in enumerate(e_process(x + sign * margin), 1) if n > 2) for sign in (1, -1)]
    (*_, last) = path(x, "e-process", E, 0.05, margins=[margin] * len(E))
    assert last["p_no_difference"] == pytest.approx(1 / min(sides))
    (row,) = path(x, "fixed", (10,), 0.05, 0.2, [margin])
    assert row["p_no_difference"] == pytest.approx(NOMINAL[10] / 2 / 0.8)
    assert path(x, "fixed", (10,), 0.05)[0]["p_no_difference"] is None
    x[3] = math.inf
    assert path(x, "e-process", E, 0.05, margins=[margin] * len(E))[-1]["p_no_difference"] is None


@pytest.mark.parametrize("rule", ["obrien-fleming", "e-process"])
def test_an_arm_at_the_margin_is_called_no_different_in_no_more_than_the_level(rule):
    looks = plan(rule)
    rng, studies = np.random.default_rng(2), 250
    wrong = 0
    for _ in range(studies):
        d = 2.0 + rng.standard_normal(looks[-1])
        wrong += path(d, rule, looks, 0.05, margins=[2.0] * len(looks))[-1]["p_no_difference"] <= 0.05
    assert stats.binomtest(wrong, studies, 0.05, alternative="greater").pvalue > 0.01
    naive = 2.0 + rng.standard_normal((1000, looks[-1]))  # TOST at each look errs more often
    hits = [stats.ttest_1samp(naive[:, :n], 2.0, axis=1, alternative="less").pvalue <= 0.05 for n in looks]
    assert np.any(hits, axis=0).mean() > 0.08


def test_the_next_look_is_for_what_is_undecided():
    reached = {"base": 5, "one": 5, "two": 3, "three": 5}
    of = {"looks": (3, 5, 8), "baseline": "base", "rule": "e-process", "racing": True}
    assert next_seeds(reached, [("base", "one")], **of) == {"one": 8, "base": 8}
    assert next_seeds(reached, [("base", "two")], **of) == {"two": 5}  # the baseline has those seeds
    assert next_seeds(reached, [("one", "three")], **of) == {"one": 8, "three": 8, "base": 8}  # a contrast
    assert next_seeds(reached, [], **of) == {}
    assert next_seeds(reached, [("base", "one")], **of | {"racing": False}) == {
        "one": 8,
        "two": 5,
        "three": 8,
        "base": 8,
    }
    assert next_seeds({"base": 8, "one": 8}, [("base", "one")], **of) == {}
    few = {"base": 6, "one": 6}
    assert next_seeds(few, [], **of | {"rule": "fixed", "looks": (6, 9)}) == {"one": 9, "base": 9}  # no claim yet
    assert next_seeds({"base": 8, "one": 8}, [], **of | {"rule": "fixed", "looks": (8, 9)}) == {}


def study(rule: str, seeds: int, gap: float, **confirm: object):
    rng = np.random.default_rng(5)
    rows = []
    for seed in range(101, 101 + seeds):
        shared = 3.3 + 0.01 * rng.standard_normal()
        for arm, worse in (("gelu", 0.0), ("floor", 0.2), ("a", gap)):
            rows.append({"arm": arm, "seed": seed, "val_nll": shared + worse + 0.004 * rng.standard_normal()})
    settings = {"arms": {"gelu": {"baseline": True}, "floor": {"floor": True}, "a": {}}}
    settings["confirm"] = {"rule": rule, "level": 0.05, "correction": "holm", "margin": "0.5%", **confirm}
    return assemble("x", "x", pd.DataFrame(rows), pd.DataFrame(), settings)


def test_the_verdict_decides_by_the_rule_and_says_so():
    result = verdict(study("obrien-fleming", 5, -0.03))
    floor, a = result["comparisons"]
    assert (result["rule"], result["looks"]) == ("obrien-fleming", [3, 5, 8, 10])
    assert a["verdict"] == "better"
    assert "obrien-fleming: look 2 of 4, at 5 seeds, stops this arm alone at p <= 0.0054, seen " in a["why"]
    assert a["p_deciding"] == a["p_anytime"] > a["p_t"]  # looks cost power
    assert floor["verdict"] == "worse"
    fixed = verdict(study("fixed", 5, -0.03))["comparisons"][1]
    assert a["improvement_low"] < fixed["improvement_low"]  # and widen the interval
    assert fixed["path"] == []


def test_a_difference_that_the_fixed_rule_would_take_is_not_taken_at_an_early_look():
    early = verdict(study("obrien-fleming", 3, -0.006))["comparisons"][1]
    assert early["verdict"] == "unfinished"  # and the next look is at 5 seeds
    late = verdict(study("obrien-fleming", 10, -0.0005))["comparisons"][1]
    assert late["verdict"] == "no difference larger than 0.5%"
    capped = verdict(study("obrien-fleming", 10, -0.0005, margin=1e-5))["comparisons"][1]
    assert capped["verdict"] == "undecided (the cap of 10 seeds is reached)"


def test_an_unknown_rule_is_refused():
    with pytest.raises(TableError, match="rule 'pocock'; allowed: fixed, obrien-fleming, e-process"):
        study("pocock", 5, 0.0)
    assert sequential.RULES[0] == "fixed"
    assert Path(sequential.__file__).name == "sequential.py"
