"""Tests of the planned seconds of cells and slots, against values computed by hand."""

import pytest
import torch

from tests.studies import SMALL, study_of
from tests.tune.helpers import models_of
from tune.errors import StudyError
from tune.plan import time
from tune.plan.probe import Calibration, Speed
from tune.study import sizes

torch.set_num_threads(1)


def test_seconds_of_a_cell_by_hand():
    study, speed = study_of(SMALL), Speed(tokens_per_second=640.0, evaluation_seconds=0.5, build_seconds=2.0)
    assert time.cell_seconds(study, "gelu", speed, "search") == pytest.approx(2 + 10 + 10 * 0.5)
    assert time.cell_seconds(study, "gelu", speed, "search", 50) == pytest.approx(2 + 5 + 5 * 0.5)
    assert time.cell_seconds(study, "gelu", speed, "confirm", rows=0.25) == pytest.approx(2 + 10 + 12 * 0.5 + 0.25)


def test_cells_on_slots_by_hand():
    assert time.pool_seconds([3, 3, 3], 1) == 9
    assert time.pool_seconds([4, 1, 1, 1, 2], 2) == 5
    assert time.pool_seconds([4, 1], 8) == 4
    assert time.pool_seconds([], 2) == 0
    # two arms on four slots: an arm's trials run one at a time unless `parallel` allows more
    assert time.search_seconds([[2, 2, 2], [1, 1, 1]], 1, 4) == 6
    assert time.search_seconds([[2, 2, 2], [1, 1, 1]], 2, 4) == 4
    assert time.search_seconds([[2, 2, 2], [1, 1, 1]], 1, 1) == 9


def test_hours_of_a_study_by_hand():
    study = study_of(SMALL, search={"trials_per_arm": 2}, calibrate={"seeds": 1, "max_points": 3}, confirm={"seeds": 2})
    speeds = dict.fromkeys(study.arms, Speed(640.0, 0.0, 0.0))  # ten seconds a trial, and one between two
    stages = time.stage_seconds(study, speeds, 3, sizes.confirm_seeds(study), 1.0, 0.0)
    assert stages == {"search": (22, 22, 22), "calibrate": (33, 33, 33), "confirm": (22, 22, 22)}
    overheads = time.Overheads(start=5.0, slot=6.0, cell=1.0, end=7.0)
    assert time.wall_seconds(stages, overheads, 0.1) == pytest.approx((18 + 77 / 1.1, 95, 18 + 77 * 1.1))
    slower = time.stage_seconds(
        study, {**speeds, "mine": Speed(320.0, 0.0, 0.0)}, 3, sizes.confirm_seeds(study), 1.0, 0.0
    )
    assert slower["search"][1] == 42


def test_an_extended_grid_and_a_stopped_trial_change_the_range():
    study = study_of(SMALL, search={"trials_per_arm": 3}, calibrate={"seeds": 1, "max_points": 5}, confirm={"seeds": 2})
    speeds = dict.fromkeys(study.arms, Speed(640.0, 0.0, 0.0))
    stages = time.stage_seconds(study, speeds, 3, sizes.confirm_seeds(study), 0.0, 0.0)
    assert stages["search"] == pytest.approx((25, 30 - 5 / 3, 30))
    assert (stages["calibrate"][0], stages["calibrate"][2]) == (30, 50)
    assert 30 < stages["calibrate"][1] < 50
    looks = study_of(SMALL, confirm={"rule": "e-process", "max_seeds": 5})
    stages = time.stage_seconds(looks, speeds, 3, (3.0, 3.5, 5.0), 0.0, 0.0)
    assert stages["confirm"] == pytest.approx((30, 35, 50))


def test_overheads_scale_with_the_machine():
    found = {"loop_seconds": 0.2, "start_seconds": 4.0, "slot_seconds": 9.0, "cell_seconds": 0.5, "end_seconds": 6.0}
    assert time.scaled_overheads(found, None) == time.Overheads(4.0, 9.0, 0.5, 6.0)
    here = Calibration({}, 3.0, 2.0, 400.0, 0.1, loop_seconds=0.1, spread=0.0, processes=2)
    assert time.scaled_overheads(found, here) == time.Overheads(2.0, 5.0, 0.25, 3.0)


def test_a_devices_speed_is_peak_times_utilisation_over_flops():
    study = study_of(SMALL)
    models = models_of(study)
    speed = time.device_speeds("a100", study, models, 0.5)["gelu"]
    assert speed.tokens_per_second == pytest.approx(19.5e12 / 2 / models["gelu"].flops_per_token)
    assert speed.evaluation_seconds == pytest.approx(8 * 16 / speed.tokens_per_second / 3)
    half = study_of(SMALL).model_copy(update={"fixed": study.fixed.model_copy(update={"precision": "bfloat16"})})
    assert time.device_speeds("h100", half, models, 1.0)["gelu"].tokens_per_second == pytest.approx(
        989e12 / models["gelu"].flops_per_token
    )
    with pytest.raises(StudyError, match=r"--hours-from gt200: allowed: measure, t4, "):
        time.check_device("gt200", 0.5)
    with pytest.raises(StudyError, match=r"--utilisation 1.5: it must be in \(0, 1\]"):
        time.check_device(time.MEASURE, 1.5)
