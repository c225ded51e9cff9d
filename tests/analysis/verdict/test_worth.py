"""Tests of what an arm is worth in training."""

import numpy as np
import pytest
from scipy import stats

from analysis.stats.trend import budget_factor


def losses(draw, n, budget, noise, common):
    """Return losses of a power law of the budget, with noise that all runs of a seed share and noise of their own."""
    return 3 * budget**-0.2 * (1 + common + noise * draw.normal(size=n))


@pytest.mark.parametrize("worth", [0.9, 1.0, 1.13, 1.5])
def test_an_arm_that_equals_longer_training_is_worth_that_much(worth):
    draw = np.random.default_rng(0)
    b, a, s = (losses(draw, 10, budget, 1e-5, 0.0) for budget in (1.0, worth, 0.8))
    found = budget_factor(b, a, s, 0.8, 0.05)
    assert found.value == pytest.approx(worth, rel=1e-3)
    assert found.low < worth < found.high
    assert found.high - found.low < 0.01


@pytest.mark.parametrize("worth", [0.9, 1.13, 1.5])
def test_a_metric_that_grows_is_worth_as_much_at_any_height(worth):
    draw = np.random.default_rng(0)
    for height in (0.0, 0.9, -5.0):  # as a loss it is minus the metric; its zero has no meaning
        b, a, s = (-(height + 0.1 * np.log(x) + 1e-5 * draw.normal(size=10)) for x in (1.0, worth, 0.8))
        found = budget_factor(b, a, s, 0.8, 0.05, logs=False)
        assert found.value == pytest.approx(worth, rel=1e-3)
        assert found.low < found.value < found.high < found.low + 0.01
        assert budget_factor(-b, -a, -s, 0.8, 0.05, logs=False) is None  # it falls with training


@pytest.mark.parametrize("logs", [True, False])
def test_interval_holds_in_95_of_100_studies(logs):
    draw, held, trials = np.random.default_rng(1), 0, 1000
    for _ in range(trials):
        common = 0.02 * draw.normal(size=10)
        b, a, s = (losses(draw, 10, budget, 0.004, common) for budget in (1.0, 1.13, 0.8))
        if not logs:
            b, a, s = np.log(b), np.log(a), np.log(s)
        found = budget_factor(b, a, s, 0.8, 0.05, logs=logs)
        held += found is not None and found.low < 1.13 < found.high
    low, high = stats.binomtest(held, trials, 0.95).proportion_ci(0.999)
    assert low < 0.95 < high


def test_no_factor_without_a_clear_fall():
    draw = np.random.default_rng(2)
    b, a, s = (3 + 0.1 * draw.normal(size=6) for _ in range(3))
    assert budget_factor(b, a, s, 0.8, 0.05) is None
    assert budget_factor(np.full(6, 2.0), np.full(6, 2.0), np.full(6, 2.1), 0.8, 0.05) is None
