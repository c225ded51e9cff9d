"""Check the cells that a study file asks for and its tables lack."""

import numpy as np
import pandas as pd
import pytest

from analysis.io.assemble import Study, assemble
from analysis.verdict.checks import unfinished

ARMS = {"gelu": {"baseline": True}, "a": {}}


def study(seeds: int, gap: float = 0.0, trials: int = 3, outcome: str = "completed", **settings: object) -> Study:
    """Make a study of two arms with `trials` search trials and `seeds` confirm seeds each; `a` is `gap` nats better."""
    draw = np.random.default_rng(5)
    rows = [
        {"stage": "search", "arm": arm, "seed": 1, "config_key": str(i), "outcome": outcome, "val_nll": 3.3}
        for arm in ARMS
        for i in range(trials)
    ]
    rows += [
        {"stage": "confirm", "arm": arm, "seed": seed, "config_key": "0", "outcome": "completed"}
        | {"val_nll": 3.3 - gap * (arm == "a") + 0.004 * draw.standard_normal()}
        for seed in range(101, 101 + seeds)
        for arm in ARMS
    ]
    said = {"arms": ARMS, "search": {"trials_per_arm": 3}, "confirm": {"seeds": 5}} | settings
    return assemble("x", "x", pd.DataFrame(rows), pd.DataFrame(), said)


@pytest.mark.parametrize("seeds", [5, 6])
def test_a_study_with_all_its_seeds_lacks_nothing(seeds):
    assert unfinished(study(seeds)) == ""


def test_a_missing_seed_is_named():
    assert unfinished(study(4)) == "confirm: gelu has 4 of 5 seeds"
    assert unfinished(study(0)) == "confirm: gelu has 0 of 5 seeds"


def test_a_sequential_rule_may_stop_at_a_look_that_decides_and_at_its_cap():
    rule = {"rule": "obrien-fleming", "margin": 1e-5}  # looks at 3, 5, 8 and 10 seeds
    assert unfinished(study(5, gap=0.03, confirm=rule)) == ""
    assert unfinished(study(4, gap=0.03, confirm=rule)) == "confirm: gelu has 4 of 10 seeds"
    assert unfinished(study(5, gap=0.0, confirm=rule)) == "confirm: gelu has 5 of 10 seeds"
    assert unfinished(study(10, gap=0.0, confirm=rule)) == ""


def test_a_study_without_confirm_lacks_search_trials_only():
    assert unfinished(study(0, stages=["search"])) == ""
    assert unfinished(study(0, trials=2, stages=["search"])) == "search: gelu has 2 of 3 trials"


def test_a_search_without_a_trained_trial_is_no_finished_study():
    assert unfinished(study(0, outcome="infeasible")) == "no search trial could be trained"
    assert unfinished(study(0, trials=2, outcome="failed")) == "search has not ended"


def test_a_table_without_a_study_file_is_finished():
    rows = pd.DataFrame([("gelu", 1, 3.3), ("a", 1, 3.2)], columns=["arm", "seed", "val_nll"])
    assert unfinished(assemble("x", "x", rows, pd.DataFrame(), {}, baseline="gelu")) == ""
