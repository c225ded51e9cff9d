"""Tests of planned cells, tokens and FLOPs, against studies of known losses and values computed by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.studies import SMALL, study_of
from tests.tune.helpers import inside, models_of, played, rows_of
from tune.decide.search import ArmSearch
from tune.plan import space, work
from tune.study import sizes
from tune.study.files import load

torch.set_num_threads(1)
ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMOKE = load(ROOT / "configs" / "smoke.yaml")


def at_the_edge(cell, share):
    """Return a loss that is worse for each later trial and best at the largest learning rate."""
    if cell.stage == "search":
        return 3.0 + 0.001 * cell.index - share
    return 3.0 - 0.01 * math.log(cell.config["lr"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_cells_and_tokens_are_those_of_a_study_played_through_the_real_stages(path):
    study = load(path)
    if study.confirm.rule != "fixed" or study.calibrate.points != 3:
        pytest.skip("the study file does not determine when it ends")
    rows = {(row.stage, row.arm): row for row in rows_of(study)}
    cells, tokens = played(study, inside)
    assert {key: row.cells[0] for key, row in rows.items()} == cells
    unstopped = {key: row.tokens[2 if key[0] == "search" else 0] for key, row in rows.items()}
    assert unstopped == tokens
    cells, tokens = played(study, at_the_edge)
    assert {key: row.cells[2] for key, row in rows.items()} == cells
    stopped = {key: row.tokens[0 if key[0] == "search" else 2] for key, row in rows.items()}
    assert stopped == tokens
    assert space.most_cells(study) == sum(cells.values())


@pytest.mark.slow
def test_cells_of_a_sequential_rule_lie_between_its_first_look_and_its_cap():
    study = study_of(SMALL, confirm={"rule": "obrien-fleming"})

    def losses(away):
        def loss(cell, share):
            if cell.stage != "confirm":
                return inside(cell, share)
            return 3.0 + away[cell.arm] + 0.01 * np.random.default_rng([cell.seed, *cell.arm.encode()]).normal()

        return loss

    clear, equal = losses({"gelu": 0.0, "floor": 0.5, "mine": -0.5}), losses({"gelu": 0.0, "floor": 0.0, "mine": 0.0})
    rows = {(row.stage, row.arm): row for row in rows_of(study)}
    assert rows["confirm", "mine"].cells == (3, 10, 10)
    assert played(study, clear)[0]["confirm", "mine"] in (3, 5)
    assert played(study, equal)[0]["confirm", "mine"] == 10


def test_the_chance_of_being_stopped_is_that_of_the_rung_rule_on_equal_trials():
    study = study_of(SMALL, search={"trials_per_arm": 7, "keep": 0.4, "parallel": 2})
    draw, stops, rounds = np.random.default_rng(3), np.zeros(7), 3000
    for _ in range(rounds):
        search = ArmSearch("gelu", {}, study.search)
        stops += [search.should_stop(index, 0.5, loss) for index, loss in enumerate(draw.uniform(size=7))]
    chances = np.array([work.stop_chance(study, index) for index in range(7)])
    assert np.all(chances[:3] == 0)
    assert np.all(stops[:3] == 0)
    assert np.all(np.abs(stops / rounds - chances) < 4 * np.sqrt(0.25 / rounds))
    assert work.stopped(study, study.baseline)[1] == pytest.approx(chances.sum())
    by_hand = [work.stop_chance(study_of(SMALL), index) for index in range(6)]  # keep 0.5, one at a time
    assert by_hand == pytest.approx([0, 0, 1 / 3, 2 / 4, 2 / 5, 3 / 6])


def test_no_trial_is_stopped_without_a_pruner_or_a_look_before_the_end():
    for search in ({"pruner": "none"}, {"spare": 0.95}):
        study = study_of(SMALL, search=search)
        assert work.stopped(study, study.baseline) == (0, 0, 0)
        assert rows_of(study)[0].tokens[0] == 6 * 6400


@pytest.mark.parametrize(("spare", "step"), [(0.5, 50), (0.41, 50), (0.4, 40), (0.3, 30), (0.91, 100)])
def test_the_rung_is_the_first_evaluation_at_or_after_its_share(spare, step):
    assert sizes.stopping_step(study_of(SMALL, search={"spare": spare})) == step


def test_flops_are_those_computed_by_hand():
    study = study_of(SMALL)
    layers, width, vocab, n_ctx = 2, 16, 300, 16
    rate = 6 * (12 * layers * width**2 + vocab * width + 2 * n_ctx * width * layers)
    parameters = vocab * width + n_ctx * width + layers * (12 * width**2 + 13 * width) + 2 * width
    models = models_of(study)
    assert {(m.flops_per_token, m.parameters) for m in models.values()} == {(rate, parameters)}
    confirm = next(row for row in rows_of(study) if (row.stage, row.arm) == ("confirm", "gelu"))
    evaluated = 10 * 8 * n_ctx + 2 * 8 * n_ctx  # ten evaluations, the test split and the padded lines
    assert confirm.flops == pytest.approx([10 * (rate * 6400 + rate / 3 * evaluated)] * 3)
    short = work.work(study, models, sizes.confirm_seeds(study), {"validation": 4, "test": 3})
    confirm = next(row for row in short if (row.stage, row.arm) == ("confirm", "gelu"))
    assert confirm.flops[1] == pytest.approx(10 * (rate * 6400 + rate / 3 * (10 * 4 + 3 + 8) * n_ctx))


def test_parameters_of_learned_alphas_are_counted():
    study = load(ROOT / "configs" / "sweep.yaml")
    found = {arm: work.arm_model(study, arm, 512) for arm in study.arms}
    assert {arm: model.alpha_parameters for arm, model in found.items()} == {
        **dict.fromkeys(("gelu", "linear-floor", "paglu-searched"), 0),
        "paglu-learnable": 1,
        "paglu-per-layer": 2,
    }
    assert found["paglu-per-layer"].parameters == found["gelu"].parameters + 2


def test_an_own_gate_is_counted_without_its_file():
    study = study_of(SMALL, arms={"mine": {"gate": "missing/own.py:hard", "alpha": 0.5}})
    assert models_of(study)["mine"] == models_of(study_of(SMALL))["mine"]


def test_the_grid_is_hardly_extended_where_many_trials_found_the_optimum():
    assert sum(sizes.grid_chances(SMOKE)["lr"].values()) == pytest.approx(1)
    few, many = study_of(SMALL, search={"trials_per_arm": 2}), study_of(SMALL, search={"trials_per_arm": 200})
    assert 3.0 <= sizes.grid_points(many)[1] < 3.1 < sizes.grid_points(few)[1] < 9
    capped = study_of(SMALL, search={"trials_per_arm": 1}, calibrate={"max_points": 4})
    assert set(sizes.grid_chances(capped)["lr"]) == {3, 4}
