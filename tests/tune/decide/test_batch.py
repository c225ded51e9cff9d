"""Tests of a tuned batch: every trial has the tokens of the study, in as many steps as its batch allows."""

import math

import numpy as np
import pytest

from analysis.describe.curves import over_training
from analysis.io.assemble import assemble
from analysis.stats.scale import scale_of
from analysis.verdict.decide import decide
from analysis.verdict.grids import grids, unbracketed
from tests.studies import SMALL, study_of
from tune.backend.inline import Inline
from tune.errors import StudyError
from tune.run.ledger import MemoryLedger
from tune.run.study_run import StudyRun
from tune.run.tables import tables
from tune.study.sizes import interval, steps
from tune.study.trial_spec import trial_spec
from tune.subject.known import Known

OPTIMUM = {"gelu": 128.0, "floor": 128.0, "mine": 192.0}  # tokens per step
RANGES = [{"loguniform": [32, 512]}, {"uniform": [32, 512]}, {"choice": [32, 64, 128, 256]}]


def tuned(where, **changes):
    return study_of(SMALL, nuisance={"batch_tokens": where}, keep={"models": "none"}, confirm={"seeds": 6}, **changes)


def loss(cell, share):
    """Return a loss whose best rate grows with the square root of the batch; `mine` is 0.03 nats better."""
    rate, batch = cell.config["lr"], cell.config["batch_tokens"]
    off = math.log(batch / OPTIMUM[cell.arm])
    noise = np.random.default_rng([cell.seed, *map(ord, cell.arm)]).normal()
    gain = {"gelu": 0.0, "floor": -0.5, "mine": 0.03}[cell.arm]
    bowl = 0.06 * (math.log(rate / 1e-3) - off / 2) ** 2 + 0.05 * off**2
    return 3.0 - gain + bowl + 0.002 * noise + 2 * math.exp(-4 * share)


def run(study, ledger=None):
    run = StudyRun(study, None, Known(study, loss), ledger=ledger or MemoryLedger())
    Inline().train(run)
    assert run.stages.finished
    return run


@pytest.mark.parametrize("where", RANGES, ids=["loguniform", "uniform", "choice"])
def test_each_arm_finds_its_batch_and_trains_on_equal_tokens(where):
    study = tuned(where)
    done = run(study)
    rows, curves = tables("s", done.ledger.events)
    confirm = rows[rows["stage"] == "confirm"]
    for arm, best in OPTIMUM.items():
        batch = done.stages.chosen[arm]["batch_tokens"]
        assert batch % 16 == 0
        assert abs(math.log(batch / best)) < 0.3
        ended = confirm[confirm["arm"] == arm]
        assert (ended["steps"] == 6400 // batch).all()
        assert (ended["tokens"] == 6400 // batch * batch).all()
    table = assemble("s", "s", rows, curves, study.model_dump())
    assert unbracketed(table) == {}
    assert (np.array(grids(table)["batch_tokens"].losses["mine"].index) % 16 == 0).all()
    verdict = {row.arm: row for row in decide(table).comparisons}
    assert verdict["mine"].kind == "better"
    assert verdict["mine"].interval[0] < 100 * 0.03 / 3.0 < verdict["mine"].interval[1] + 0.1
    path = over_training(table)["mine"]  # of runs with different steps, at the baseline's tokens
    points = curves[(curves["arm"] == "gelu") & (curves["stage"] == "confirm")]["step"].nunique()
    assert points - 2 <= len(path) <= points
    assert path["improvement_percent"].between(0.3, 1.6).all()


def test_a_study_that_was_cut_off_asks_for_the_same_batches():
    study = tuned(RANGES[0])
    whole = run(study)
    for kept in (7, 40, 160):
        ledger = MemoryLedger()
        ledger.events += whole.ledger.events[:kept]
        again = run(study, ledger)
        assert again.stages.chosen == whole.stages.chosen
    asked = [e["config"]["batch_tokens"] for e in whole.ledger.events if e["event"] == "suggested"]
    assert len(set(asked)) > 4
    assert all(batch % 16 == 0 for batch in asked)


def test_evaluations_and_steps_follow_the_batch(tmp_path):
    study = tuned(RANGES[0], fixed={"eval_every": 10})
    for batch, updates, every in ((64, 100, 10), (128, 50, 5), (48, 133, 13), (512, 12, 1)):
        config = {"lr": 1e-3, "batch_tokens": float(batch)}
        trial = trial_spec(study, "mine", config, 1, tmp_path, False)
        assert (trial.batch_tokens, trial.steps, trial.evaluation_interval) == (batch, updates, every)
        assert (steps(study, config), interval(study, config)) == (updates, every)
    assert trial_spec(study, "mine", {"lr": 1e-3}, 1, tmp_path, False).evaluation_interval == 10


@pytest.mark.parametrize(
    ("where", "more", "why"),
    [
        ({"choice": [64, 72]}, {}, "nuisance.batch_tokens has 72; allowed: multiples of model.n_ctx=16 up to 3200"),
        ({"uniform": [32.5, 64]}, {}, "nuisance.batch_tokens has 32.5: "),
        ({"loguniform": [64, 6400]}, {}, "nuisance.batch_tokens has 6400; allowed: "),
        ({"choice": [32, 64]}, {"micro_batch_tokens": 64}, "multiples of fixed.micro_batch_tokens=64 up to 3200"),
        ({"choice": [0, 64]}, {}, "nuisance.batch_tokens has 0"),
    ],
)
def test_batches_that_no_trial_can_have_are_refused(where, more, why):
    with pytest.raises(StudyError, match=why):
        tuned(where, fixed=more)


@pytest.mark.parametrize("where", [{"uniform": [16, 48]}, {"loguniform": [16, 32]}, {"choice": [16, 32]}])
def test_the_next_point_of_a_narrow_range_is_another_batch(where):
    scale = scale_of("batch_tokens", where, 2.0, (16, 96))
    value, seen = 16.0, [16.0]
    while not scale.is_end(value, 1):
        value = scale.beyond(value, 1)
        seen.append(value)
    assert seen == sorted(set(seen))
    assert all(each % 16 == 0 for each in seen)
    assert seen[-1] == 96
    assert scale.is_end(16.0, -1)
    assert not scale.is_end(32.0, -1)
