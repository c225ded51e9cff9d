"""Tests of the power of a plan, against statsmodels and the level of the rule."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from analysis.io.assemble import assemble
from analysis.verdict.decide import decide
from tests.studies import SMALL, study_of
from tests.tune.helpers import inside, played
from tune.errors import StudyError
from tune.plan import power
from tune.run import ledger, tables
from tune.study.files import dump


def test_power_of_the_fixed_rule_is_that_of_the_paired_t_test():
    study = study_of(SMALL, confirm={"seeds": 10})
    found = power.confirm_power(study, 0.005, 0.004)
    assert found["level"] == 0.025  # two comparisons: Holm's first step
    reference = TTestPower()
    assert found["power"] == pytest.approx(reference.power(1.25, 10, 0.025), abs=1e-6)
    assert reference.power(found["smallest"] / 0.004, 10, 0.025) == pytest.approx(0.8, abs=1e-6)
    assert reference.power(1.25, found["needed"], 0.025) >= 0.8 > reference.power(1.25, found["needed"] - 1, 0.025)
    alone = power.confirm_power(study_of(SMALL, confirm={"correction": "none"}), 0.005, 0.004)
    assert (alone["level"], alone["level_is"]) == (0.05, "no correction")


def test_power_of_a_sequential_rule_is_simulated():
    study = study_of(SMALL, confirm={"rule": "obrien-fleming"})
    clear = power.confirm_power(study, 0.02, 0.002)
    assert clear["power"] == 1.0
    assert 3 <= clear["seeds"] <= 5
    none = power.confirm_power(study, 1e-9, 0.002)
    assert none["power"] < stats.binom.ppf(0.999, power.SIMULATED, 0.025) / power.SIMULATED
    assert none["seeds"] > 9.5


def test_noise_of_a_study_is_the_spread_of_its_paired_differences(tmp_path):
    study = study_of(SMALL, confirm={"seeds": 4})
    shared, own = (np.random.default_rng(seed).normal(0, scale, (3, 4)) for seed, scale in ((1, 0.05), (2, 0.01)))
    arms = list(study.arms)

    def loss(cell, share):
        if cell.stage != "confirm":
            return inside(cell, share)
        return 3.0 + shared[0, cell.seed - 101] + own[arms.index(cell.arm), cell.seed - 101]

    played(study, loss, tmp_path)
    (tmp_path / "study.yaml").write_text(dump(study))
    tables.write_tables("small", ledger.read(tmp_path / "ledger.jsonl"), tmp_path)
    noise, each = power.study_noise(tmp_path)
    baseline = (3.0 + shared[0] + own[0]).mean()
    assert noise == pytest.approx((own[0] - own[2]).std(ddof=1) / baseline)
    assert each["floor"] == pytest.approx((own[0] - own[1]).std(ddof=1) / baseline)
    with pytest.raises(StudyError, match=r"--noise .*no-such: .*no such file or folder"):
        power.study_noise(tmp_path / "no-such")


@pytest.mark.parametrize("text", ["0.5", "x%", "-1%", "0%", "inf%", "nan%", ""])
def test_a_percentage_is_asked_for(text):
    with pytest.raises(StudyError, match=r"--effect .*: allowed: a percentage of the baseline's loss above 0, such as"):
        power.percentage(text, "--effect")


def test_percentages():
    assert power.percentage("0.5%", "--effect") == 0.005
    assert power.percentage(" 2 % ", "--effect") == 0.02


def test_the_plan_and_the_verdict_name_one_smallest_effect():
    """The verdict's MDE of a study with the planned noise is the plan's smallest effect, with any number of arms."""
    for arms, confirm in ((1, {}), (3, {}), (3, {"reserve": 0.2}), (2, {"test": "welch"}), (3, {"correction": "none"})):
        named = {f"a{i}": {"gate": "tanh", "alpha": 0.1 * (i + 1)} for i in range(arms)}
        study = study_of(SMALL, arms={"floor": None, "mine": None, **named}, confirm={"seeds": 8, **confirm})
        rng, rows = np.random.default_rng(arms), []
        x = rng.normal(size=8)
        unit = (x - x.mean()) / x.std(ddof=1)
        paired = study.confirm.test == "paired"
        rows += [("gelu", 101 + i, 4 + (0.0 if paired else 0.012 / np.sqrt(2) * u)) for i, u in enumerate(unit)]
        spread = 0.012 if paired else -0.012 / np.sqrt(2)
        rows += [(arm, 101 + i, 4.001 + spread * u) for arm in named for i, u in enumerate(unit)]
        table = pd.DataFrame(rows, columns=["arm", "seed", "test_nll"]).assign(stage="confirm", outcome="completed")
        result = decide(assemble("x", "x", table, pd.DataFrame(), study.model_dump()))
        planned = power.confirm_power(study, 0.005, 0.012 / 4)
        for row in result.comparisons:
            assert row.mde_percent / 100 == pytest.approx(planned["smallest"], rel=1e-9)
