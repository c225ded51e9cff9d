"""Simulate small versions of the studies in docs/protocol.md: the whole decision on trials with known true losses."""

import math
from pathlib import Path

import decision_error
import numpy as np
import pytest
from scipy import stats
from simulation import expected, page, world

from analysis.stats.multiplicity import adjust
from analysis.verdict.kinds import Verdict

TREATMENTS = world.TREATMENTS


@pytest.fixture(scope="module")
def nulls():
    """Simulate 40 studies in which no treatment differs from the baseline."""
    scenario = world.NULLS[3]  # optima apart: the grid's best point fails here
    rows = decision_error.simulate(scenario, range(40))
    return rows, decision_error.summarise(scenario, rows)


def test_equal_arms_are_rarely_called_different(nulls):
    rows, summary = nulls
    wrong = sum(any(row["arms"][arm]["verdict"] in ("better", "worse") for arm in TREATMENTS) for row in rows)
    assert wrong == summary["family_error"]["hits"]
    assert stats.binomtest(wrong, len(rows), 0.05, alternative="greater").pvalue > 0.01
    assert summary["coverage"]["share"] > 0.9


@pytest.mark.slow
def test_the_grids_best_point_and_the_usual_practice_err_more_often(nulls):
    _, summary = nulls
    grid = decision_error.summarise(world.GRID[1], decision_error.simulate(world.GRID[1], range(15)))
    errors = (grid["family_error"]["hits"], 15), (summary["family_error_usual"]["hits"], 40)
    for hits, of in errors:
        assert stats.binomtest(hits, of, 0.05, alternative="greater").pvalue < 0.05


def test_the_same_seed_gives_the_same_study(nulls):
    assert decision_error.simulate(world.NULLS[3], range(7, 8))[0] == nulls[0][7]


def test_true_differences_are_found_and_a_blind_regime_is_not_testable():
    scenario = world.EFFECTS[0]
    summary = decision_error.summarise(scenario, decision_error.simulate(scenario, range(8)))
    assert summary["power"]["second"]["hits"] >= 7  # 0.6% with noise of 0.2%
    assert summary["wrong_direction"]["hits"] == 0
    assert summary["family_error"] is None
    blind = decision_error.summarise(world.BLIND[0], decision_error.simulate(world.BLIND[0], range(8)))
    assert blind["not_testable"]["hits"] >= 6


def test_the_world_is_what_its_scenario_says():
    scenario = world.Scenario("x", noisier={"second": 4.0}, gaps={"first": -0.02}, noise="heavy")
    simulated = world.World(scenario, ["baseline", "first", "second"], 3)
    at = {arm: math.exp(simulated.optimum[arm]) for arm in simulated.optimum}
    losses = {arm: np.array([simulated.trial(arm, at[arm], seed) for seed in range(4000)]) for arm in at}
    paired = losses["baseline"] - losses["first"]
    assert paired.mean() == pytest.approx(0.02, abs=4 * paired.std() / 4000**0.5)
    reach = [float(stats.iqr(losses["baseline"] - losses[arm])) for arm in ("first", "second")]
    assert reach[1] / reach[0] == pytest.approx(math.sqrt(17 / 2), rel=0.2)  # sd 4 and 1 against 1 and 1
    spread = np.corrcoef(losses["baseline"], losses["first"])[0, 1]
    assert spread == pytest.approx(0.012**2 / (0.012**2 + 0.006**2), abs=0.1)
    assert simulated.trial("first", at["first"] * math.exp(4), 1) == math.inf
    assert simulated.curve("first", 3.0, 0.25) > simulated.curve("first", 3.0, 0.75) > 3.0


def test_the_drawn_confirm_stages_decide_as_the_verdict_does():
    study = decision_error.parse(
        world.STUDY.replace("CHOICE", "fit").replace("CONFIRM", world.CONFIRM["fixed"]), Path("simulated.yaml")
    )
    scenario = world.Scenario("x", gaps=world.EFFECT)
    seen = set()
    for seed in range(6):
        result, _, _ = decision_error.decide(study, world.World(scenario, list(study.arms), seed))
        words = [row.kind in (Verdict.BETTER, Verdict.WORSE) for row in result.comparisons]
        differences = np.array([row.differences for row in result.comparisons])
        assert expected.rejects(differences[None], 0.05)[0].tolist() == words
        seen |= set(words)
    assert seen == {True, False}


def test_holm_in_the_drawn_stages_is_holm():
    rng = np.random.default_rng(4)
    d = rng.standard_normal((15, 4, 8)) + rng.choice([0.0, 0.8, 1.2], (15, 4, 1))
    p = stats.ttest_1samp(d, 0.0, axis=2).pvalue
    wanted = np.array([np.array(adjust(list(row), "holm")) <= 0.05 for row in p])
    assert (expected.rejects(d, 0.05) == wanted).all()
    assert 0.2 < wanted.mean() < 0.8


def test_the_chance_of_an_error_is_that_of_a_noncentral_t():
    one = world.World(world.Scenario("x"), ["baseline", "first"], 5)
    at = {arm: math.exp(one.optimum[arm]) for arm in one.optimum}
    assert expected.error(one, at, 8, 0.05, 1, draws=20_000) == pytest.approx(0.05, abs=0.006)
    z = 0.4  # the arm is tuned off its optimum
    chosen = at | {"first": at["first"] * math.exp(z)}
    excess = 0.06 * z * z * (1 + 0.2 * math.tanh(z))
    away = excess / (0.006 * math.sqrt(2 * 1.04 / 8))  # a test loss adds one fifth of the noise
    limit = stats.t.ppf(0.975, 7)
    power = stats.nct.sf(limit, 7, away) + stats.nct.cdf(-limit, 7, away)
    assert expected.error(one, chosen, 8, 0.05, 1, draws=20_000) == pytest.approx(power, abs=0.012)
    assert power > 0.5


def test_the_chance_of_an_error_is_within_its_level_and_close_to_what_the_verdicts_do(nulls):
    rows, summary = nulls
    found = summary["family_error_expected"]
    assert found["share"] == pytest.approx(np.mean([row["expected"] for row in rows]))
    assert found["high"] - found["share"] == pytest.approx(
        stats.norm.ppf(0.975) * stats.sem([row["expected"] for row in rows]), rel=1e-3
    )
    assert found["low"] <= 0.05
    assert found["high"] < 0.065
    assert summary["family_error"]["low"] < found["share"] < summary["family_error"]["high"]
    effects = decision_error.summarise(
        world.EFFECTS[0], decision_error.simulate(world.EFFECTS[0], range(20_000, 20_001))
    )
    assert effects["family_error_expected"] is None


def test_an_interrupted_run_goes_on_from_what_it_kept(tmp_path, monkeypatch):
    scenario = world.Scenario("one / two")
    first = decision_error._part(scenario, range(3, 5), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one---two-3-2.json"]
    monkeypatch.setattr(decision_error, "simulate", lambda *_: pytest.fail("simulated again"))
    again = decision_error._part(scenario, range(3, 5), tmp_path)
    assert decision_error.summarise(scenario, again) == decision_error.summarise(scenario, first)
    with pytest.raises(ValueError, match="is of another scenario of that name; use an empty folder"):
        decision_error._part(world.Scenario("one / two", sd=0.1), range(3, 5), tmp_path)


def test_a_share_has_wilsons_interval():
    found = decision_error._share(98, 2000)
    assert (found["low"], found["high"]) == pytest.approx((0.0403735, 0.0593557), abs=1e-6)
    assert decision_error._share(0, 0)["share"] is None


def test_tables_and_figure_go_between_the_markers(nulls, tmp_path):
    target = tmp_path / "protocol.md"
    target.write_text("before\n<!-- decision_error: start -->\nold\n<!-- decision_error: end -->\nafter\n")
    page.write([nulls[1]], target)
    text = target.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert f"| optima apart (up to a factor 1.5) | 40 | {page.percent(nulls[1]['family_error'])} |" in text
    assert (tmp_path / "img" / "decision_error.svg").read_bytes().startswith(b"<?xml")
    (tmp_path / "none.md").write_text("no markers")
    with pytest.raises(ValueError, match="needs the markers"):
        page.write([nulls[1]], tmp_path / "none.md")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [*world.NULLS, *world.SEQUENTIAL], ids=lambda scenario: scenario.name)
def test_the_promised_error_rate_in_300_studies(scenario):
    summary = decision_error.summarise(scenario, decision_error.simulate(scenario, range(1000, 1300)))
    hits, of = summary["family_error"]["hits"], summary["family_error"]["of"]
    assert stats.binomtest(hits, of, 0.05, alternative="greater").pvalue > 0.001
