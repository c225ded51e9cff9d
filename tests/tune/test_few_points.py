"""Tests of studies whose arms can have fewer different configurations than search trials."""

from collections import Counter

import pytest

from analysis.io import study as tables
from analysis.verdict.checks import unfinished
from tests.studies import SMALL, study_of
from tests.tune.helpers import inside
from tune.backend.inline import Inline
from tune.plan import space, work
from tune.run import tables as written
from tune.run.study_run import StudyRun
from tune.study import sizes
from tune.study.files import dump
from tune.subject.known import Known

CHANGES = {
    "nuisance": {"lr": {"choice": [1e-3, 2e-3, 4e-3]}},
    "arms": {"mine": {"gate": "tanh", "alpha": {"search": {"choice": [0.25, 0.75]}}}},
    "search": {"trials_per_arm": 5},
}
CELLS = {"gelu": 3, "floor": 3, "mine": 5}


def test_every_arm_trains_its_different_configurations_once(tmp_path):
    study = study_of(SMALL, **CHANGES)
    assert {arm: sizes.arm_trials(study, arm) for arm in study.arms} == CELLS
    (tmp_path / "x").mkdir()
    run = StudyRun(study, tmp_path / "x", Known(study, inside))
    assert run.stages.remaining() == 11 + 3 * (6 + 10)
    Inline().train(run)
    run.close()
    assert run.stages.finished
    search = [record.cell for record in run.records.values() if record.cell.stage == "search"]
    assert Counter(cell.arm for cell in search) == CELLS
    assert len({(cell.arm, cell.config_key) for cell in search}) == 11
    again = StudyRun(study, tmp_path / "x", Known(study, inside))
    assert not again.missing
    again.close()


def test_a_search_alone_of_few_points_is_finished(tmp_path):
    study = study_of(SMALL, **CHANGES, stages=["search"])
    (tmp_path / "x").mkdir()
    run = StudyRun(study, tmp_path / "x", Known(study, inside))
    Inline().train(run)
    run.close()
    written.write_tables(study.name, run.ledger.events, run.folder)
    (run.folder / "study.yaml").write_text(dump(study))
    assert unfinished(tables.load(run.folder)) == ""


def test_the_plan_counts_them_and_says_so():
    study = study_of(SMALL, **CHANGES)
    models = {arm: work.arm_model(study, arm, 300) for arm in study.arms}
    rows = work.work(study, models, sizes.confirm_seeds(study))
    assert {row.arm: row.cells[1] for row in rows if row.stage == "search"} == CELLS
    assert space.most_cells(study) == 11 + 3 * (int(sizes.grid_points(study)[2]) * study.calibrate.seeds + 10)
    assert sizes.short_searches(study) == [
        "search: gelu, floor can have 3 different configurations, fewer than search.trials_per_arm=5; the search of "
        "each ends after 3"
    ]
    assert sizes.short_searches(study_of(SMALL)) == []


@pytest.mark.parametrize(
    ("points", "seeds", "arms", "said"), [(3, 1, 5, True), (4, 1, 5, False), (4, 1, 4, True), (3, 2, 5, False)]
)
def test_one_selection_seed_needs_points_and_arms_that_show_the_noise(points, seeds, arms, said):
    more = {f"arm{i}": {"gate": "sigmoid", "alpha": 0.1 * i} for i in range(arms - 3)}
    study = study_of(SMALL, calibrate={"points": points, "seeds": seeds}, arms=more)
    assert len(study.arms) == arms
    notes = sizes.design_notes(study)
    assert [f"on {points} points and {arms} arms does not show the noise" in note for note in notes] == [True] * said
    grid = study_of(SMALL, calibrate={"points": points, "seeds": seeds, "choice": "grid"}, arms=more)
    assert sizes.design_notes(grid) == []


@pytest.mark.parametrize(("choice", "trials"), [([1e-3], 1), ([1e-3, 2e-3], 2)])
def test_one_point_is_tried_once(choice, trials):
    study = study_of(SMALL, nuisance={"lr": {"choice": choice}})
    assert sizes.all_trials(study) == 3 * trials
