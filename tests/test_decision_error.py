"""The simulated studies behind docs/protocol.md, in short: the whole decision on trials whose true losses are known."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import decision_error  # noqa: E402
from simulation import page, world  # noqa: E402

TREATMENTS = world.TREATMENTS


@pytest.fixture(scope="module")
def nulls():
    """40 studies in which no treatment differs from the baseline."""
    scenario = world.NULLS[3]  # optima apart: where the grid's best point fails
    rows = decision_error.simulate(scenario, range(40))
    return rows, decision_error.summarise(scenario, rows)


def test_equal_arms_are_rarely_called_different(nulls):
    rows, summary = nulls
    wrong = sum(any(row["arms"][arm]["verdict"] in ("better", "worse") for arm in TREATMENTS) for row in rows)
    assert wrong == summary["family_error"]["hits"]
    assert stats.binomtest(wrong, len(rows), 0.05, alternative="greater").pvalue > 0.01
    assert summary["coverage"]["share"] > 0.9


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
