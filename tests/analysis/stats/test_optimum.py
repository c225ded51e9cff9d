"""Fit of the learning rate: exact on a parabola, equal to numpy's fit, and no reward for luck."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.meta_analysis import combine_effects

from analysis.stats.optimum import Optimum, bends, optima, optimum, share

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
    expected = math.exp(-b / (2 * (c + error / 2)) + np.log(RATES).mean())
    assert optimum(RATES, losses, sd).fitted == pytest.approx(expected)
    assert optimum(RATES, losses, sd).fitted == pytest.approx(1e-3, rel=1e-3)  # noise alone gives the centre


def test_the_order_of_rates_does_not_matter_and_nothing_is_extrapolated():
    losses = bowl(RATES, 2e-2)
    assert optimum(RATES, losses, 0.0).fitted == pytest.approx(RATES[-1])
    order = [3, 0, 4, 1, 2]
    assert optimum([RATES[i] for i in order], losses[order], 0.01) == optimum(RATES, losses, 0.01)


def test_an_infeasible_seed_takes_its_rate_out():
    losses = bowl(RATES, 1.2e-3)
    losses[3, 1] = math.inf
    assert optimum(RATES, losses, 0.0).fitted == pytest.approx(1.2e-3)  # the three others lie on the same parabola
    assert optimum(RATES, losses, 0.0).rate <= RATES[2] * 2
    losses[:2] = math.inf
    assert optimum(RATES, losses, 0.0).fitted is None  # only two rates remain
    assert optimum(RATES, losses, 0.0).rate == RATES[2]
    with pytest.raises(ValueError, match="none of 5 learning rates has a finite loss on every seed"):
        optimum(RATES, np.full((5, 2), math.inf), 0.0)


def test_the_noise_is_the_larger_of_own_and_the_median():
    rng = np.random.default_rng(2)
    noise = {"quiet": 0.001, "middle": 0.01, "loud": 0.1}
    losses = {arm: bowl(RATES, 1e-3, noise=sd, rng=rng) for arm, sd in noise.items()}
    own = {}
    for arm, x in losses.items():  # residuals after a mean per rate and a mean per seed
        left = x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()
        own[arm] = math.sqrt(float((left**2).sum() / 4))
    assert own["quiet"] < own["middle"] < own["loud"]
    found = optima(RATES, losses)
    assert found["loud"].standard_error == pytest.approx(own["loud"] / math.sqrt(2))
    for arm in ("quiet", "middle"):  # one noisy arm says nothing about the others
        assert found[arm].standard_error == pytest.approx(own["middle"] / math.sqrt(2))


def test_one_seed_has_the_noise_that_parabolas_leave_of_the_arms_together():
    rng, x = np.random.default_rng(3), np.log(RATES)
    bends_alike = 0.02 * (x - x.mean())[:, None] ** 3  # a part that all arms share is no noise
    losses = {
        arm: bowl(RATES, 1e-3 * 1.1**i, seeds=1, noise=0.01, rng=rng) + bends_alike for i, arm in enumerate("abcdef")
    }
    left = np.stack([table[:, 0] - np.polyval(np.polyfit(x, table[:, 0], 2), x) for table in losses.values()])
    sd = math.sqrt(((left - left.mean(0)) ** 2).sum() / (5 * 2))
    assert bends(RATES, losses) == pytest.approx(sd)
    assert sd == pytest.approx(0.01, rel=0.4)
    found = optima(RATES, losses)
    assert found == share({arm: optimum(RATES, table, bends(RATES, losses)) for arm, table in losses.items()})
    assert all(one.standard_error == 0 for one in optima(RATES, losses, bent=False).values())
    # a rate that is infeasible for an arm counts for none, until three are left; then arms with four count whole
    losses["a"][0] = np.inf
    assert bends(RATES[1:], {arm: table[1:] for arm, table in losses.items()}) == pytest.approx(bends(RATES, losses))
    losses["b"][1:3] = np.inf
    whole = np.concatenate(
        [left[2:].ravel(), (losses["a"][1:, 0] - np.polyval(np.polyfit(x[1:], losses["a"][1:, 0], 2), x[1:]))]
    )
    assert bends(RATES, losses) == pytest.approx(math.sqrt((whole**2).sum() / (4 * 2 + 1)))
    assert bends(RATES[:3], {arm: table[:3] for arm, table in losses.items()}) == 0
    exact = {arm: bowl(RATES, 1e-3 * 1.1**i, seeds=1) for i, arm in enumerate("abc")}
    assert bends(RATES, exact) == bends(RATES, {"a": exact["a"]}) == 0  # no round-off of exact parabolas
    two = {arm: np.repeat(table, 2, 1) for arm, table in losses.items()}
    assert optima(RATES, two) == optima(RATES, two, bent=False)  # two seeds show their noise themselves


def test_the_error_of_the_optimum_is_its_spread_over_studies():
    rng, logs, errors = np.random.default_rng(3), [], []
    for _ in range(2000):
        found = optimum(RATES[1:4], bowl(RATES[1:4], 1.1e-3, noise=0.004, rng=rng), 0.004)
        logs.append(math.log(found.own))
        errors.append(found.error)
    assert np.median(errors) == pytest.approx(np.std(logs), rel=0.05)
    assert optimum(RATES, bowl(RATES, 1.1e-3), 0.0).error == 0


def arms_at(logs, errors, reach=(1e-6, 1.0)):
    return {
        str(i): Optimum(1e-3, math.exp(x), 0.06, 0.004, math.exp(x), e, reach)
        for i, (x, e) in enumerate(zip(logs, errors, strict=True))
    }


@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_optima_read_together_are_those_of_a_random_effects_model(spread):
    """Compare with statsmodels: variance and mean of the optima are those of DerSimonian and Laird."""
    x, e = spread * np.array([-0.05, 0.02, 0.09, -0.01, 0.04]) - 7, np.array([0.05, 0.06, 0.04, 0.07, 0.05])
    with np.errstate(invalid="ignore"):  # statsmodels takes the root of a negative variance
        model = combine_effects(x, e**2, method_re="chi2")
    tau2 = max(0.0, model.tau2)
    assert (tau2 > 0) == (spread > 1)
    weight = 1 / (e**2 + tau2)
    step = e**2 * weight * (weight @ x / weight.sum() - x)
    if tau2:
        assert weight @ x / weight.sum() == pytest.approx(model.mean_effect_re)
    moved = np.log([found.rate for found in share(arms_at(x, e)).values()])
    assert moved == pytest.approx(x + np.clip(step, -0.5 * e, 0.5 * e))
    assert np.abs(moved - x).max() > 1e-3


def test_an_arm_whose_optimum_lies_elsewhere_moves_by_half_an_error_at_most_and_stays_on_its_grid():
    x, e = [-7.0, -7.0, -7.0, -7.0, -6.0], [0.02] * 4 + [0.5]
    found = share(arms_at(x, e))
    assert math.log(found["4"].rate) == pytest.approx(-6.25)
    assert found["4"].own == pytest.approx(math.exp(-6.0))
    low = math.exp(-6.1)
    assert share(arms_at(x, e, reach=(low, 1.0)))["4"].rate == pytest.approx(low)


def test_without_noise_or_alone_an_arm_keeps_its_optimum():
    lone = arms_at([-7.0], [0.1])
    assert share(lone) == lone
    exact = arms_at([-7.0, -6.0], [0.0, 0.0])
    assert share(exact) == exact
    unfitted = arms_at([-7.0], [0.1]) | {"none": Optimum(2e-3, None, None, 0.004)}
    assert share(unfitted) == unfitted


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
