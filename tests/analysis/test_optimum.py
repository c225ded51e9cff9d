"""The fitted learning rate: exact on a parabola, the same answer from numpy's fit, and no reward for luck."""

import math

import numpy as np
import pytest
from scipy import stats

from analysis.optimum import optima, optimum

RATES = [2.0**k * 1e-3 for k in range(-2, 3)]


def bowl(rates, at, curvature=0.06, seeds=2, noise=0.0, rng=None):
    x = np.log(np.asarray(rates) / at)
    eps = noise * rng.standard_normal((len(x), seeds)) if rng else np.zeros((len(x), seeds))
    return 3 + curvature * x[:, None] ** 2 + eps


@pytest.mark.parametrize("at", [0.8e-3, 1.0e-3, 1.3e-3])
def test_without_noise_the_bottom_of_the_parabola_is_found(at):
    found = optimum(RATES, bowl(RATES, at), 0.0)
    assert found.fitted == found.rate == pytest.approx(at)
    assert found.curvature == pytest.approx(0.06)
    assert found.grid_best == min(RATES, key=lambda rate: abs(math.log(rate / at)))


def test_without_noise_it_is_the_parabola_through_the_best_three():
    losses = bowl(RATES, 1.2e-3) + 0.05 * np.log(np.array(RATES) / 1e-3)[:, None] ** 4
    best = int(losses.mean(1).argmin())
    near = slice(best - 1, best + 2)
    c, b, _ = np.polyfit(np.log(RATES[near]), losses.mean(1)[near], 2)
    assert optimum(RATES, losses, 0.0).fitted == pytest.approx(math.exp(-b / (2 * c)))


def test_with_much_noise_all_points_weigh_the_same_and_the_curvature_is_steadied():
    losses, sd = bowl(RATES, 2.2e-3), 1e3
    x = np.log(RATES) - np.log(RATES).mean()
    (c, b, _), covariance = np.polyfit(x, losses.mean(1), 2, cov="unscaled")
    error = sd / math.sqrt(2) * math.sqrt(covariance[0, 0])
    expected = math.exp(-b / (2 * (c + error)) + np.log(RATES).mean())
    assert optimum(RATES, losses, sd).fitted == pytest.approx(expected)
    assert optimum(RATES, losses, sd).fitted == pytest.approx(1e-3, rel=1e-3)  # noise alone: the centre


def test_the_order_of_rates_does_not_matter_and_nothing_is_extrapolated():
    losses = bowl(RATES, 2e-2)
    assert optimum(RATES, losses, 0.0).fitted == pytest.approx(RATES[-1])
    order = [3, 0, 4, 1, 2]
    assert optimum([RATES[i] for i in order], losses[order], 0.01) == optimum(RATES, losses, 0.01)


def test_an_infeasible_seed_takes_its_rate_out():
    losses = bowl(RATES, 1.2e-3)
    losses[3, 1] = math.inf
    assert optimum(RATES, losses, 0.0).fitted == pytest.approx(1.2e-3)  # three others lie on the same parabola
    assert optimum(RATES, losses, 0.0).rate <= RATES[2] * 2
    losses[:2] = math.inf
    assert optimum(RATES, losses, 0.0).fitted is None  # two rates left
    assert optimum(RATES, losses, 0.0).rate == RATES[2]
    with pytest.raises(ValueError, match="none of 5 learning rates has a finite loss on every seed"):
        optimum(RATES, np.full((5, 2), math.inf), 0.0)


def test_the_noise_is_the_larger_of_own_and_pooled():
    rng = np.random.default_rng(2)
    losses = {"quiet": bowl(RATES, 1e-3), "loud": bowl(RATES, 1e-3, noise=0.1, rng=rng)}
    x = losses["loud"]
    left = x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()
    own = float((left**2).sum() / 4)
    found = optima(RATES, losses)
    assert found["loud"].standard_error == pytest.approx(math.sqrt(own / 2))
    assert found["quiet"].standard_error == pytest.approx(math.sqrt(own / 2 / 2))


def test_equal_arms_differ_less_by_the_fit_than_by_the_grids_best():
    rng, excess = np.random.default_rng(0), {"fit": [], "grid": []}
    for _ in range(300):
        at = 1e-3 * 2 ** rng.uniform(-0.5, 0.5)
        found = optima(RATES, {arm: bowl(RATES, at, 0.02, noise=0.006, rng=rng) for arm in "ab"})
        for kind, rate in (("fit", "rate"), ("grid", "grid_best")):
            a, b = (0.02 * math.log(getattr(found[arm], rate) / at) ** 2 for arm in "ab")
            excess[kind].append(abs(a - b))
    se = math.sqrt(2 / 8) * 0.006  # of a difference over 8 confirm seeds
    power = [stats.norm.sf(1.96 - np.array(excess[kind]) / se).mean() for kind in ("fit", "grid")]
    assert power[0] < 0.03  # 0.025 without any difference in tuning
    assert power[1] > 0.05
