"""Cases against scipy and statsmodels, limits, and simulated null data that must keep the promised error rate."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from analysis.describe import budget
from analysis.stats import estimates, multiplicity, paired_tests, power, sequential


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


def test_sign_flip_equals_scipy_permutation_test(rng: np.random.Generator):
    for n in (2, 3, 7, 12):
        d = np.round(rng.normal(0.1, 1, n), 1)  # rounding makes ties and zeros
        want = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
        assert paired_tests.sign_flip(d)[0] == pytest.approx(want, abs=1e-12)


def test_sign_flip_beyond_twenty_has_an_error_that_covers_the_t_approximation(rng: np.random.Generator):
    d = rng.normal(0.3, 1, 60)
    p, error = paired_tests.sign_flip(d)
    assert error == pytest.approx(np.sqrt(p * (1 - p) / paired_tests.DRAWS))
    assert error > 0
    assert p == pytest.approx(paired_tests.paired_t(d)[2], abs=6 * error + 0.002)
    assert paired_tests.sign_flip(d) == (p, error)  # the same draws each time


def test_worst_rank_equals_scipy_wilcoxon(rng: np.random.Generator):
    for n in (6, 9, 15):
        d = rng.normal(0.4, 1, n)
        assert paired_tests.worst_rank(d) == pytest.approx(stats.wilcoxon(d, method="exact").pvalue, abs=1e-12)
    assert paired_tests.worst_rank([0.0, 0.0]) == 1.0


def test_tost_equals_statsmodels(rng: np.random.Generator):
    b, a = rng.normal(3, 0.1, 9), rng.normal(3, 0.1, 9)
    want, (_, lower, _), (_, upper, _) = ttost_paired(b, a, -0.1, 0.1)
    assert paired_tests.tost(b - a, 0.1) == pytest.approx((want, lower, upper), abs=1e-12)
    excluded = paired_tests.tost_excludes(b - a, 0.05)
    assert paired_tests.tost(b - a, excluded)[0] == pytest.approx(0.05, abs=1e-12)
    with pytest.raises(ValueError, match=r"margin -0.1; allowed: above 0"):
        paired_tests.tost(b - a, -0.1)


def test_fieller_is_the_paired_t_test_inverted(rng: np.random.Generator):
    b = rng.normal(3, 0.3, 7)
    a = 0.97 * b + rng.normal(0, 0.05, 7)
    for level in (0.05, 0.01):
        for end in estimates.fieller(b, a, level):
            ratio = 1 - end / 100
            assert stats.ttest_1samp(a - ratio * b, 0).pvalue == pytest.approx(level, abs=1e-9)


def test_fieller_has_no_bounds_where_the_baseline_is_not_clearly_above_zero():
    assert estimates.fieller([0.1, 2.0, -1.5, 0.3], [1.0, 2.0, 3.0, 2.5]) is None
    assert estimates.improvement_percent([-1.0, 0.5], [1.0, 1.0]) is None
    assert estimates.improvement_percent([3.0, np.inf], [1.0, 1.0]) is None


def test_power_equals_statsmodels_and_the_level_at_no_effect():
    for d, n, level in ((0.3, 12, 0.05), (1.2, 6, 0.01), (0.05, 500, 0.05), (0.7, 2, 0.1)):
        assert power.power(d, n, level) == pytest.approx(TTestPower().power(d, n, level), abs=1e-8)
        assert power.power(0.0, n, level) == pytest.approx(level, abs=1e-10)


def test_tost_power_against_simulation(rng: np.random.Generator):
    draws, n, shift, margin = 40_000, 10, 0.2, 1.2
    d = rng.normal(shift, 1, (draws, n))
    se = d.std(1, ddof=1) / np.sqrt(n)
    t = stats.t.isf(0.05, n - 1)
    share = np.mean(((d.mean(1) + margin) / se > t) & ((d.mean(1) - margin) / se < -t))
    assert power.tost_power(shift, margin, n) == pytest.approx(share, abs=5 * np.sqrt(0.25 / draws))


def test_seeds_needed_is_the_smallest_number_that_is_enough():
    n = power.seeds_needed(0.5, 0.1, 0.05, 0.05)
    assert power.power(0.5, n) >= 0.8 > power.power(0.5, n - 1)
    assert n == int(np.ceil(TTestPower().solve_power(0.5, power=0.8, alpha=0.05)))
    assert power.seeds_needed(1e-6, 1e-6, 0.05, 0.05) is None
    n = power.seeds_needed(0.0, 1.0, 0.05, 0.05)  # no effect: only equivalence can be shown
    assert power.tost_power(0.0, 1.0, n) >= 0.8 > power.tost_power(0.0, 1.0, n - 1)


def test_dunnett_with_many_blocks_approaches_scipy(rng: np.random.Generator):
    # scipy.stats.dunnett has no blocks: without block effects and with many rows, both agree
    table = rng.normal(0, 1, (400, 4)) + np.array([0, 0.1, 0.17, -0.05])
    got = multiplicity.dunnett_blocked(table[:, 0], list(table[:, 1:].T))["p_adjusted"]
    want = stats.dunnett(*table[:, 1:].T, control=table[:, 0], rng=np.random.default_rng(0)).pvalue
    assert got == pytest.approx(want, abs=0.02)
    one = multiplicity.dunnett_blocked(table[:, 0], [table[:, 1]])
    assert one["p_adjusted"] == pytest.approx([stats.ttest_rel(table[:, 0], table[:, 1]).pvalue], abs=1e-9)


def test_adjust_equals_statsmodels(rng: np.random.Generator):
    names = {"holm": "holm", "bonferroni": "bonferroni", "benjamini-hochberg": "fdr_bh"}
    families = [rng.uniform(size=k) ** 3 for k in (1, 2, 5, 12)]
    families += [np.array([0.02, 0.5, 0.02, 1.0, 0.0, 0.5]), np.zeros(3), np.ones(4)]
    for p in families:
        for name, theirs in names.items():
            assert multiplicity.adjust(p.tolist(), name) == multipletests(p, method=theirs)[1].tolist()


def test_adjust_refuses_nan_and_unknown_corrections():
    with pytest.raises(ValueError, match="a p value is NaN"):
        multiplicity.adjust([0.1, np.nan], "holm")
    with pytest.raises(ValueError, match=r"correction 'x'; allowed: holm"):
        multiplicity.adjust([0.1], "x")
    assert multiplicity.adjust([0.3, 0.1], "none") == [0.3, 0.1]


def test_obrien_fleming_looks_keep_the_level_of_the_t_test(rng: np.random.Generator):
    looks = (3, 5, 8, 10)
    levels = sequential.nominal_levels()
    assert levels == (0.00035, 0.0054, 0.0245, 0.0352)
    other = sequential.nominal_levels((4, 8, 12), 0.1)
    assert list(other) == sorted(other)
    for looks_, levels_, level in ((looks, levels, 0.05), ((4, 8, 12), other, 0.1)):
        x = rng.standard_normal((200_000, looks_[-1]))
        stopped = np.zeros(len(x), bool)
        for n, p in zip(looks_, levels_, strict=True):
            t = np.abs(x[:, :n].mean(1)) / x[:, :n].std(1, ddof=1) * np.sqrt(n)
            stopped |= t >= stats.t.isf(p / 2, n - 1)
        assert stopped.mean() == pytest.approx(level, abs=0.004)
    with pytest.raises(ValueError, match=r"looks \[5, 3\]; allowed: rising"):
        sequential.nominal_levels((5, 3))


def test_e_process_rejects_a_true_null_at_most_at_the_level(rng: np.random.Generator):
    rejected = 0
    for _ in range(2000):
        rejected += max(sequential.e_process(rng.normal(0, 1, sequential.CAP))) >= 20
    assert rejected / 2000 <= 0.05  # Ville's inequality, with a look after every seed
    assert sequential.e_value(5000.0, 25_000) == pytest.approx(np.exp(690))  # capped where a float overflows
    assert sequential.e_process([0.1, 0.1, 0.1]) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="complete pairs"):
        sequential.e_process([0.1, np.inf])


def test_expected_best_against_draws(rng: np.random.Generator):
    losses = rng.normal(3, 0.2, 12)
    draws = rng.integers(0, 12, size=(200_000, 5))
    assert budget.expected_best(losses, True)[4] == pytest.approx(losses[draws].min(1).mean(), abs=0.001)
    assert budget.expected_best([3.0, np.inf], False) == [np.inf, 3.0]
    assert budget.expected_best([3.0, np.inf], True) == [np.inf, np.inf]
    with pytest.raises(ValueError, match="1 of them NaN"):
        budget.expected_best([3.0, np.nan], True)


def test_probability_of_improvement_is_mann_whitney(rng: np.random.Generator):
    b, a = np.round(rng.normal(0, 1, 9), 1), np.round(rng.normal(0.2, 1, 7), 1)
    want = stats.mannwhitneyu(b, a).statistic / 63
    assert estimates.probability_of_improvement(b, a) == pytest.approx(want, abs=1e-12)
    assert estimates.probability_of_improvement([1.0], [np.inf]) == 0.0


def test_expected_best_of_many_trials_is_the_ratio_of_binomials(rng: np.random.Generator):
    x = np.sort(rng.normal(size=300))
    budgets = budget.shown_budgets(300)
    assert budgets[:100] == list(range(1, 101))
    assert budgets[-1] == 300
    assert len(budgets) == len(set(budgets)) <= 200
    picked = [1, 7, 150, 299, 300]
    wanted = [
        sum(float(Fraction(math.comb(300 - i, b - 1), math.comb(300, b))) * x[i - 1] for i in range(1, 302 - b))
        for b in picked
    ]
    assert budget.expected_best(x, False, picked) == pytest.approx(wanted, rel=1e-12)
    assert budget.expected_best(x, True, picked)[0] == pytest.approx(x.mean())
    assert budget.shown_budgets(3) == [1, 2, 3]
