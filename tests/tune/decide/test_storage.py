"""Searches of studies in a storage of Optuna."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from tests.own_trainings import NAMED, named_study
from tests.tune.decide.ladders import ladder_of
from tests.tune.helpers import row_at
from tune.decide.storage import in_memory
from tune.study.cell import Cell, Record
from tune.study.files import load

SMOKE = load(Path(__file__).parents[3] / "configs" / "smoke.yaml")


def record(index, outcome, config, arm="paglu-searched", rung=0, stage="search"):
    final = {"val_nll": 4.0 - index} if outcome == "completed" else {}
    curve = [row_at(4) | {"val_nll": 5.0}, row_at(8) | {"val_nll": None}]
    cell = Cell(stage, arm, index, 1, config, f"key{index}", rung=rung)
    return Record(cell, outcome=outcome, final=final, curve=curve, started=100.0, ended=200.0 if outcome else None)


def studies_of(storage):
    return {
        each.study_name: optuna.load_study(storage=storage, study_name=each.study_name)
        for each in optuna.get_all_study_summaries(storage)
    }


def test_each_arm_is_a_study_with_its_space_values_and_states():
    config = {"lr": 0.01, "alpha": 0.5}
    outcomes = ["completed", "stopped_early", "infeasible", None]
    trials = [record(index, outcome, config) for index, outcome in enumerate(outcomes)]
    trials.append(replace(record(4, None, config), started=None))
    others = [record(0, "completed", {"lr": 0.005}, arm="gelu"), record(9, "completed", config, stage="confirm")]
    found = studies_of(in_memory([(SMOKE, [*reversed(trials), *others])]))
    assert found.keys() == {"smoke: paglu-searched", "smoke: gelu"}
    searched = found["smoke: paglu-searched"]
    assert [trial.state for trial in searched.trials] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.RUNNING,
        TrialState.WAITING,
    ]
    best = searched.best_trial
    assert (best.params, best.value, best.intermediate_values) == (config, 4.0, {4: 5.0})
    assert (best.distributions["alpha"].low, best.distributions["lr"].log) == (0.0, True)
    assert (best.datetime_start, best.datetime_complete) == (datetime.fromtimestamp(100), datetime.fromtimestamp(200))
    assert best.user_attrs["cell"] == "search/paglu-searched/0/1"
    assert searched.trials[3].datetime_complete is None
    assert searched.metric_names == ["val_nll"]


def test_a_metric_that_grows_is_maximised_under_its_name(tmp_path):
    study = named_study(tmp_path)
    trials = [record(index, "completed", {"depth": 4.0, "rate": 0.1}, arm="new") for index in (0, 1)]
    (found,) = studies_of(in_memory([(study, trials)])).values()
    assert (found.direction.name, found.metric_names) == ("MAXIMIZE", [NAMED["metric"]["name"]])
    assert [trial.value for trial in found.trials] == [-4.0, -3.0]  # the ledger has losses
    assert found.best_trial.number == 1
    assert found.best_trial.distributions["depth"].choices == (1, 2, 3, 4, 6, 8)


def test_the_rungs_of_a_ladder_and_several_studies_are_apart():
    config = {"lr": 0.01, "weight_decay": 0.1}
    ladder = [record(0, "completed", config, arm="gelu", rung=rung) for rung in (1, 2)]
    found = studies_of(in_memory([(ladder_of(), ladder), (SMOKE, [record(0, "completed", {"lr": 0.005}, arm="gelu")])]))
    assert found.keys() == {"tiny: rung 1, gelu", "tiny: rung 2, gelu", "smoke: gelu"}


def test_a_value_outside_the_space_is_refused():
    with pytest.raises(ValueError, match="lr"):
        in_memory([(SMOKE, [record(0, "completed", {"lr": 50.0}, arm="gelu")])])
