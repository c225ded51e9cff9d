"""The statistics of the headline figure, against scipy and the worlds that it draws."""

import headline
import numpy as np
import pytest
from scipy import stats

FACTS = {
    "difference_sd": 0.003,
    "curvature": 0.036,
    "optima_sd": 0.0927,
    "floor_gap": 0.032,
    "seconds": 47.0,
    "tokens": 614_400.0,
}


def test_the_published_studies_have_the_facts_of_the_page():
    found = headline.published()
    assert found == pytest.approx(FACTS, rel=0.02)


def test_the_tests_are_those_of_scipy_with_holms_correction():
    rng = np.random.default_rng(5)
    losses = {arm: 3.3 + 0.01 * rng.standard_normal(8) for arm in ("baseline", "floor", "first", "second")}
    losses["floor"] += 0.1
    losses["first"] -= 0.02
    p = {arm: stats.ttest_rel(losses["baseline"], losses[arm]).pvalue for arm in ("floor", "first", "second")}
    ordered = sorted(p, key=p.__getitem__)
    wanted, going = {}, True
    for step, arm in enumerate(ordered):
        going = going and p[arm] <= 0.05 / (3 - step)
        wanted[arm] = going
    assert headline.fixed(losses, 8) == wanted
    assert wanted["floor"]
    losses["second"][0] = np.inf  # a run that diverged decides against its arm
    assert headline.fixed(losses, 8)["second"]


def test_one_standard_deviation_errs_if_one_arm_is_noisier():
    world = headline.scenario(FACTS, noisier={"second": 4.0})
    errs = {"fixed": 0.0, "pooled": 0.0}
    for seed in range(200):
        drawn = headline.World(world, [*headline.ARMS, "baseline", "floor"], seed)
        losses = headline.runs(drawn, {arm: {"lr": float(np.exp(drawn.optimum[arm]))} for arm in drawn.optimum}, 8)
        for rule in errs:
            differs = headline.fixed(losses, 8, rule == "pooled")
            errs[rule] += any(differs[arm] for arm in headline.ARMS) / 200
    assert errs["fixed"] < 0.1 < errs["pooled"]


def test_the_stages_cost_what_their_trials_do():
    world = headline.scenario(FACTS, headline.GAP)
    for tuning, search, least in (("now", 0.0, 32.0), ("before", 24.0, 48.0)):
        study = headline.study_of(world, tuning)
        drawn = headline.World(world, list(study.arms), 3)
        chosen, cost = headline.tune(study, drawn, 1.0, 3)
        assert set(chosen) == set(study.arms)
        assert len(chosen) == 8
        assert search <= cost["search"] <= 48
        assert least <= cost["calibrate"]
        assert cost["search"] == 0 or tuning == "before"
        assert cost["calibrate"] % (8 if tuning == "now" else 16) == 0
        assert all(abs(np.log(chosen[arm]["lr"]) - drawn.optimum[arm]) < 0.7 for arm in chosen)


def test_racing_takes_a_clear_loser_out_and_finds_the_better_arm():
    world = headline.scenario(FACTS, headline.GAP)
    study = headline.study_of(world, "now", "rule: obrien-fleming, max_seeds: 10")
    rng = np.random.default_rng(1)
    shared = 3.3 + 0.01 * rng.standard_normal(10)
    losses = {arm: shared + 0.001 * rng.standard_normal(10) for arm in study.arms}
    losses["floor"] += 0.1
    losses["first"] -= 0.0165
    differs, cells = headline.raced(study, losses)
    assert {arm for arm, found in differs.items() if found} == {"floor", "first"}
    assert cells == 8 * 5  # all are decided at the second look
