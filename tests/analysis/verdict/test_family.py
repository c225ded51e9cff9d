"""Check what depends on the number of arms: the level of each test, power, equivalence, intervals after selection."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from analysis.io.assemble import assemble
from analysis.stats import multiplicity, power
from analysis.verdict.decide import decide

N = 8


def judged(differences, base=None, **confirm):
    """Return the comparisons of arms whose losses are those of a baseline minus given differences, in nats."""
    n = len(differences[0])
    base = 3.0 + 0.01 * np.sin(np.arange(n)) if base is None else base
    rows = [("base", s, x) for s, x in enumerate(base)]
    rows += [
        (f"a{i}", s, b - x) for i, d in enumerate(differences) for s, (b, x) in enumerate(zip(base, d, strict=True))
    ]
    table = pd.DataFrame(rows, columns=["arm", "seed", "val_nll"])
    return decide(assemble("x", "x", table, pd.DataFrame(), {"confirm": confirm}, baseline="base")).comparisons


def shaped(mean, sd, n=N, seed=0):
    """Return n values of exactly this mean and standard deviation."""
    x = np.random.default_rng(seed).normal(size=n)
    return mean + sd * (x - x.mean()) / x.std(ddof=1)


def visible(n, level, target=0.8):
    """Return the d_z of that power, from the noncentral t distribution of scipy."""

    def found(d):
        bound, shift = stats.t.isf(level / 2, n - 1), d * math.sqrt(n)
        return stats.nct.sf(bound, n - 1, shift)  # the other tail is below 1e-6 at this power

    return optimize.brentq(lambda d: found(d) - target, 0.1, 4)


def test_the_smallest_visible_effect_is_that_of_the_first_step_of_the_correction():
    differences = [shaped(0.002, 0.004, seed=i) for i in range(7)]
    for row in judged(differences):
        assert row.level_of_first_step == pytest.approx(0.05 / 7)
        d_z = row.mde_percent / 100 * row.baseline_mean / row.sd_difference
        assert d_z == pytest.approx(visible(N, 0.05 / 7), rel=1e-6)
        assert d_z == pytest.approx(1.696, abs=5e-4)
        want = stats.nct.sf(stats.t.isf(0.05 / 14, 7), 7, row.t) + stats.nct.cdf(stats.t.ppf(0.05 / 14, 7), 7, row.t)
        assert row.power_at_effect_seen == pytest.approx(want, rel=1e-6)
    (alone,) = judged(differences[:1])
    assert alone.mde_percent / 100 * alone.baseline_mean / alone.sd_difference == pytest.approx(1.156, abs=5e-4)
    uncorrected = judged(differences, correction="none")[0]
    assert uncorrected.mde_percent == pytest.approx(alone.mde_percent)


def test_arms_with_one_and_the_same_t_are_told_the_same_number_of_seeds():
    rows = judged([shaped(0.004, 0.005, n=6, seed=i) for i in range(3)], margin=0.001)
    assert {row.kind for row in rows} == {"undecided"}
    assert len({row.verdict for row in rows}) == 1
    enough = next(n for n in range(6, 100) if visible(n, 0.05 / 3) <= 0.8)
    assert {row.seeds_needed for row in rows} == {enough}
    assert rows[0].verdict == f"undecided (needs about {enough - 6} more seeds)"


def test_equivalence_is_corrected_for_the_number_of_arms():
    rows = judged([shaped(mean, 0.01, seed=i) for i, mean in enumerate((0.0, 0.004, 0.0045, 0.005))], margin=0.0128)
    p = []
    for row in rows:
        error = row.sd_difference / math.sqrt(N)
        p.append(stats.t.sf((0.0128 - row.mean_difference) / error, N - 1))
        assert row.p_tost == pytest.approx(p[-1], rel=1e-9)
    want, running = {}, 0.0
    for rank, x in enumerate(sorted(p)):  # Holm by hand
        running = max(running, min(1.0, (4 - rank) * x))
        want[x] = running
    for row, x in zip(rows, p, strict=True):
        assert row.p_tost_adjusted == pytest.approx(want[x], rel=1e-9)
        assert (row.kind == "no_difference") == (row.p_tost_adjusted <= 0.05)
    assert [row.kind for row in rows] == ["no_difference", "undecided", "undecided", "undecided"]
    assert rows[1].p_tost < 0.05  # it would be called equivalent if it were the only arm
    assert "adjusted TOST p = " in rows[0].why
    assert judged([shaped(0.004, 0.01, seed=1)], margin=0.0128)[0].kind == "no_difference"


@pytest.mark.parametrize("arms", [3, 7])
def test_arms_at_the_margin_are_rarely_called_equivalent(arms):
    rng, studies = np.random.default_rng(arms), 20_000
    d = rng.normal(2.0, 1.0, (studies, arms, N))
    error = d.std(2, ddof=1) / math.sqrt(N)
    p = np.maximum(stats.t.sf((d.mean(2) + 2) / error, N - 1), stats.t.cdf((d.mean(2) - 2) / error, N - 1))
    adjusted = np.sort(p, 1)[:, 0] * arms  # Holm: any arm is called equivalent exactly if its first step is
    assert (adjusted <= 0.05).mean() == pytest.approx(0.05, abs=0.006)
    assert (p <= 0.05).any(1).mean() > 2 * 0.05  # without a correction
    some = multiplicity.adjust(p[0], "holm")
    assert min(some) == pytest.approx(min(1.0, adjusted[0]))


@pytest.mark.parametrize("correction", ["holm", "bonferroni", "benjamini-hochberg", "none"])
def test_a_p_is_at_or_below_its_own_level_exactly_if_the_correction_rejects_it(correction):
    rng = np.random.default_rng(1)
    for m in (1, 2, 3, 7, 20):
        for _ in range(300):
            p = rng.uniform(size=m) ** rng.integers(1, 7)
            levels = multiplicity.decision_levels(p, correction, 0.05)
            rejected = np.array(multiplicity.adjust(p, correction)) <= 0.05
            assert (p <= levels).tolist() == rejected.tolist()
            assert min(levels) >= multiplicity.first_level(m, correction, 0.05) * (1 - 1e-12)


def test_how_much_a_detected_effect_is_too_large_follows_from_n_and_d_z():
    rng = np.random.default_rng(2)
    for d_z, n, level in ((0.6, 8, 0.05 / 3), (1.2, 8, 0.05), (0.3, 20, 0.01)):
        d = rng.normal(d_z, 1, (150_000, n))
        error = d.std(1, ddof=1) / math.sqrt(n)
        found = np.abs(d.mean(1)) > stats.t.isf(level / 2, n - 1) * error
        want = np.abs(d.mean(1)[found]).mean() / d_z
        assert power.exaggeration(d_z * math.sqrt(n), n - 1, level) == pytest.approx(want, rel=0.015)
    assert power.exaggeration(0.6 * math.sqrt(8), 7, 0.05 / 3) == pytest.approx(1.72, abs=0.005)
    assert power.exaggeration(20.0, 7, 0.05) == pytest.approx(1.0, abs=1e-3)


def test_an_interval_after_selection_covers_where_the_plain_one_does_not():
    rng, studies, d_z = np.random.default_rng(3), 60_000, 0.6
    d = rng.normal(d_z, 1, (studies, 3, N))
    mean, error = d.mean(2), d.std(2, ddof=1) / math.sqrt(N)
    p = 2 * stats.t.sf(abs(mean / error), N - 1)
    order = np.sort(p, 1)
    steps = np.cumprod(order <= 0.05 / (3 - np.arange(3)), 1).sum(1)  # Holm
    declared = p.argsort(1).argsort(1) < steps[:, None]
    covers = {
        level: (abs(mean - d_z) <= stats.t.isf(level / 2, N - 1) * error)[declared].mean() for level in (0.05, 0.05 / 3)
    }
    assert covers[0.05] == pytest.approx(0.85, abs=0.015)
    assert covers[0.05 / 3] == pytest.approx(0.95, abs=0.01)


def test_an_arm_that_was_declared_different_has_the_interval_that_holds_after_selection():
    rows = judged([shaped(0.02, 0.004), shaped(0.001, 0.004, seed=1), shaped(-0.03, 0.004, seed=2)], margin=1e-4)
    base = 3.0 + 0.01 * np.sin(np.arange(N))
    for row, seed, mean in ((rows[0], 0, 0.02), (rows[2], 2, -0.03)):
        assert row.selected_level == pytest.approx(0.05 / 3)
        for end in (row.selected_low, row.selected_high):  # Fieller at level / 3, by the t test that it inverts
            left = base - shaped(mean, 0.004, seed=seed) - (1 - end / 100) * base
            assert stats.ttest_1samp(left, 0).pvalue == pytest.approx(0.05 / 3, rel=1e-6)
        assert row.selected_low < row.improvement_low < row.improvement_high < row.selected_high
        assert row.exaggeration == pytest.approx(power.exaggeration(row.t, 7, 0.05 / 3))
    assert (rows[1].kind, rows[1].selected_low, rows[1].exaggeration) == ("undecided", None, None)


def test_the_reason_says_how_far_a_found_effect_is_too_large():
    weak = judged([shaped(0.0055, 0.004, seed=i) for i in range(3)], margin=1e-4)[0]
    assert weak.kind == "better"
    assert 1.05 < weak.exaggeration < 1.2
    assert (
        f"if the true effect is the one seen, {weak.power_at_effect_seen:.0%} of such studies find it, and an effect "
        f"that is declared different at this power is on average {weak.exaggeration:.2f} times too large"
    ) in weak.why
    low, high = weak.selected_low, weak.selected_high
    assert "the interval at 98.3%, which holds for all arms together" in weak.why
    assert f"is [{low:+.2f}, {high:+.2f}]%" in weak.why
    clear = judged([shaped(0.05, 0.004, seed=i) for i in range(3)], margin=1e-4)[0]
    assert "times too large" not in clear.why
