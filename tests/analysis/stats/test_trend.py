"""The slope over sizes and the gain in compute, against independent calculations and at their limits."""

import math

import numpy as np
import pytest
from scipy import stats

from analysis.stats import trend

X = [40.0, 43.0, 47.0, 48.0]


def losses(seed, n, mean, gain):
    """Return paired losses of a baseline and an arm, whose mean is lower by a percentage."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 0.05, n)
    return mean + shared + rng.normal(0, 0.01, n), mean * (1 - gain / 100) + shared + rng.normal(0, 0.01, n)


def test_the_error_of_a_ratio_of_means_is_that_of_the_jackknife():
    b, a = losses(1, 400, 3.0, 1.5)
    found = trend.improvement(b, a)
    assert found.value == pytest.approx(100 * (1 - a.mean() / b.mean()))
    left_out = [100 * (1 - np.delete(a, i).mean() / np.delete(b, i).mean()) for i in range(len(a))]
    assert found.error == pytest.approx(math.sqrt(399 / 400 * np.sum((left_out - np.mean(left_out)) ** 2)), rel=1e-3)
    assert found.df == 399
    apart = trend.improvement(b, a[:300], paired=False)
    spread = stats.ttest_ind(b, a[:300], equal_var=False)
    assert apart.error > 3 * found.error  # the shared part of the noise stays in
    assert apart.df == pytest.approx(spread.df, rel=0.02)


def test_the_slope_is_the_least_squares_line_with_welchs_degrees_of_freedom():
    means = [trend.Mean(1.2, 0.1, 7), trend.Mean(0.9, 0.2, 3), trend.Mean(0.4, 0.05, 9), trend.Mean(0.5, 0.3, 2)]
    found = trend.slope(X, means, 0.05)
    assert found.value == pytest.approx(np.polyfit(X, [m.value for m in means], 1)[0])
    weights = np.linalg.pinv(np.column_stack([np.ones(4), X]))[1]
    parts = weights**2 * np.array([m.error for m in means]) ** 2
    df = parts.sum() ** 2 / np.sum(parts**2 / np.array([m.df for m in means]))
    assert found.error == pytest.approx(math.sqrt(parts.sum()))
    assert found.df == pytest.approx(df)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.value) / found.error, df))
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, df, found.value, found.error))


def test_two_equal_ends_have_welchs_test():
    # with three rungs at equal distances, the middle one has no weight: the slope is half the difference of the ends
    (b1, a1), (b2, a2), (b3, a3) = (losses(i, 6 + i, 1.0, 0.5 * i) for i in range(3))
    ends = [trend.improvement(b, a) for b, a in ((b1, a1), (b2, a2), (b3, a3))]
    found = trend.slope([1, 2, 3], ends, 0.05)
    parts = [100 * (a / b.mean() - b * a.mean() / b.mean() ** 2) for b, a in ((b1, a1), (b3, a3))]
    wanted = stats.ttest_ind(parts[0] - parts[0].mean() + ends[2].value, parts[1] + ends[0].value, equal_var=False)
    assert found.value == pytest.approx((ends[2].value - ends[0].value) / 2)
    assert (found.p, found.df) == pytest.approx((wanted.pvalue, wanted.df))


@pytest.mark.parametrize(
    ("x", "means"),
    [
        ([1, 2], [trend.Mean(1, 0.1, 7)] * 2),
        ([2, 2, 2], [trend.Mean(1, 0.1, 7)] * 3),
        ([1, 2, 3], [trend.Mean(1, 0.0, 7)] * 3),
    ],
)
def test_no_slope_without_three_sizes_or_any_spread(x, means):
    assert trend.slope(x, means, 0.05) is None


def test_a_rung_without_spread_still_counts():
    found = trend.slope([1, 2, 3], [trend.Mean(0, 0.0, 7), trend.Mean(1, 0.1, 7), trend.Mean(2, 0.1, 5)], 0.05)
    assert (found.value, found.df) == (1, pytest.approx(5))


def power_law(seed, gain, n=8, exponent=0.05):
    """Return compute, baseline and arm of three rungs on which the baseline's loss is a power of compute."""
    compute = np.array([1e12, 8e12, 64e12])
    return compute, [losses(seed + i, n, 5 * (c / 1e12) ** -exponent, gain) for i, c in enumerate(compute)]


def near(compute, rungs, i, low, high):
    """Return the neighbours of a rung."""
    ends = [None if at == i else rungs[at][0] for at in (low, high)]
    return trend.Neighbours((math.log(compute[low]), math.log(compute[high])), *ends)


@pytest.mark.parametrize(("i", "low", "high"), [(0, 0, 1), (1, 0, 2), (2, 1, 2)])
def test_the_factor_of_compute_is_that_of_the_law(i, low, high):
    compute, rungs = power_law(3, 1.0, n=4000)
    found = trend.compute_factor(*rungs[i], near(compute, rungs, i, low, high), 0.05)
    true = 0.99 ** (-1 / 0.05)
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(true, rel=0.01)
    b, a = rungs[i]
    slope = math.log(rungs[high][0].mean() / rungs[low][0].mean()) / math.log(compute[high] / compute[low])
    assert math.log(found.value) == pytest.approx(math.log(a.mean() / b.mean()) / slope)


def test_the_interval_of_the_factor_is_wide_as_a_bootstrap_of_a_large_sample():
    compute, rungs = power_law(5, 2.0, n=200)
    rng, drawn = np.random.default_rng(1), []
    for _ in range(1000):
        again = [(b[pick], a[pick]) for b, a in rungs for pick in [rng.integers(0, 200, 200)]]
        drawn.append(trend.compute_factor(*again[0], near(compute, again, 0, 0, 1), 0.05).value)
    found = trend.compute_factor(*rungs[0], near(compute, rungs, 0, 0, 1), 0.05)
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), rel=0.015)


def test_no_factor_if_the_baseline_does_not_clearly_fall():
    compute, rungs = power_law(3, 1.0)
    at = near(compute, rungs, 1, 0, 2)
    assert trend.compute_factor(*rungs[1], trend.Neighbours(at.log_compute, at.above, at.below), 0.05) is None  # rises
    noisy = np.random.default_rng(1).normal(5, 2, (2, 4))
    assert trend.compute_factor(*rungs[1], trend.Neighbours(at.log_compute, *noisy), 0.05) is None
    assert trend.compute_factor(*rungs[1], trend.Neighbours((1.0, 1.0), at.below, at.above), 0.05) is None
    flat = np.full(8, 4.0)
    still = trend.Neighbours(at.log_compute, np.full(8, 5.0), np.full(8, 3.0))
    assert trend.compute_factor(flat, flat * 0.99, still, 0.05) is None  # nothing varies


def test_intervals_cover_in_95_of_100_studies():
    rng, hits = np.random.default_rng(2), np.zeros(4)
    compute, exponent, studies = np.array([1e12, 8e12, 64e12]), 0.05, 400
    for _ in range(studies):
        rungs = []
        for c in compute:
            shared, mean = rng.normal(0, 0.012, 6), 5 * (c / 1e12) ** -exponent
            rungs.append((mean + shared + rng.normal(0, 0.006, 6), 0.99 * mean + shared + rng.normal(0, 0.006, 6)))
        slope = trend.slope(np.log2(compute), [trend.improvement(b, a) for b, a in rungs], 0.05)
        hits[3] += slope.low <= 0 <= slope.high
        for i, (low, high) in enumerate([(0, 1), (0, 2), (1, 2)]):
            found = trend.compute_factor(*rungs[i], near(compute, rungs, i, low, high), 0.05)
            hits[i] += found.low <= 0.99 ** (-1 / exponent) <= found.high
    for count in hits:
        assert stats.binomtest(int(count), studies, 0.95).pvalue > 0.001
