"""The scale of a hyperparameter: distances, legal ends, rounding, and what is calibrated at all."""

import math

import pytest

from analysis.stats.optimum import Bracket, bracket, enclosed
from analysis.stats.scale import LEGAL, calibrated, first_of, is_whole, scale_of
from tune.study.sections import TUNABLE


@pytest.mark.parametrize(
    ("name", "where", "middle", "step"),
    [
        ("lr", {"loguniform": [1e-4, 1e-2]}, 1e-3, math.log(2)),
        ("weight_decay", {"loguniform": [0.01, 1.0]}, 0.1, math.log(100) / 4),
        ("dropout", {"uniform": [0.0, 0.4]}, 0.2, 0.1),
        ("beta2", {"uniform": [0.9, 0.999]}, 0.99, math.log(100) / 4),
        ("clip", {"choice": [0.5, 1.0, 2.0]}, 1.0, math.log(4) / 4),
        ("warmup", {"choice": [0.1, 0.2]}, 0.15, 0.025),
        ("weight_decay", {"choice": [0.0, 0.2]}, 0.1, 0.05),
    ],
)
def test_a_scale_has_its_middle_and_its_step(name, where, middle, step):
    scale, values = scale_of(name, where, 2.0), next(iter(where.values()))
    assert scale.mean([values[0], values[-1]]) == pytest.approx(middle, rel=1e-3)
    assert scale.step == pytest.approx(step)
    assert scale.value(scale.to(middle)) == pytest.approx(middle, rel=1e-3)


def test_values_are_rounded_and_never_leave_the_legal_range():
    dropout = scale_of("dropout", {"uniform": [0.0, 0.4]}, 2.0)
    assert dropout.value(-0.3) == 0.0
    assert dropout.value(7.0) == LEGAL["dropout"][1] < 1
    assert dropout.is_end(0.0, -1)
    assert dropout.is_end(0.02, -1)  # the next point would be less than a quarter of a step away
    assert not dropout.is_end(0.1, -1)
    assert not dropout.is_end(0.4, 1)  # the end of the searched range is none of the legal one
    beta = scale_of("beta2", {"uniform": [0.9, 0.99]}, 2.0)
    assert beta.value(beta.to(0.95123456)) == 0.95123  # four digits of 1 - beta
    assert beta.value(1e9) < 1
    assert scale_of("clip", {"loguniform": [0.1, 10]}, 2.0).value(math.log(0.123456)) == 0.1235
    assert not scale_of("weight_decay", {"loguniform": [0.01, 1]}, 2.0).is_end(1e-6, -1)


def test_a_list_of_the_users_own_study_is_never_left():
    where = {"choice": [8.0, 1.0, 12345.0, 2.0]}
    scale = scale_of("depth", where, 2.0, own=True)
    assert [scale.to(value) for value in (1.0, 2.0, 8.0, 12345.0)] == [0, 1, 2, 3]
    assert [scale.value(at) for at in (-4.0, 0.4, 1.6, 2.2, 3.7)] == [1.0, 1.0, 8.0, 8.0, 12345.0]
    assert scale.value(scale.to(6.0)) == 8.0  # a prediction on a ladder may lie between two of them
    assert (scale.beyond(2.0, 1), scale.beyond(12345.0, 1)) == (8.0, 12345.0)
    assert (scale.is_end(1.0, -1), scale.is_end(2.0, -1), scale.is_end(12345.0, 1)) == (True, False, True)
    assert (is_whole(where), is_whole({"choice": [0.5]}), is_whole({"uniform": [1.0, 2.0]})) == (True, False, False)
    assert scale_of("depth", where, 2.0).value(2.0) not in where["choice"]  # of the built-in model


def test_the_first_hyperparameter_is_lr_or_the_first_that_has_several_values():
    several, one = {"uniform": [1.0, 2.0]}, {"choice": [1.0]}
    assert first_of({"a": several, "lr": several}) == "lr"
    assert first_of({"a": one, "b": several}) == "b"
    assert first_of({"a": one}) == "a"
    assert first_of({}) is None


def test_every_key_that_a_study_may_tune_has_a_legal_range():
    assert set(TUNABLE) == set(LEGAL)


def test_a_single_value_is_not_calibrated():
    ranges = {"clip": {"choice": [1.0]}, "weight_decay": {"choice": [0.1, 0.2]}, "lr": {"choice": [1e-3]}}
    assert calibrated(ranges) == ["lr", "weight_decay"]


@pytest.mark.parametrize(
    ("means", "ends", "wanted"),
    [
        ([2, 1, 2], (False, False), Bracket.CLOSED),
        ([1, 2, 3], (False, False), Bracket.END),
        ([3, 2, 1], (False, False), Bracket.END),
        ([1, 2, 3], (True, False), Bracket.CLOSED),
        ([3, 2, 1], (True, False), Bracket.END),
        ([2, 1, math.inf], (False, False), Bracket.DIVERGES),
        ([math.inf, 1, 2], (False, False), Bracket.DIVERGES),
        ([2, 1, 1.5, math.inf], (False, False), Bracket.CLOSED),
        ([1, 2, math.inf], (True, False), Bracket.FEW),
        ([math.inf] * 3, (False, False), Bracket.FEW),
    ],
)
def test_a_best_point_needs_a_finite_neighbour_on_each_side(means, ends, wanted):
    assert bracket(means, ends) is wanted


@pytest.mark.parametrize(
    ("name", "chosen", "tried", "wanted"),
    [
        ("lr", 2e-3, [1e-3, 4e-3, 2e-3], Bracket.CLOSED),
        ("lr", 4e-3, [1e-3, 4e-3, 2e-3], Bracket.END),
        ("lr", 1e-3, [1e-3, 4e-3, 2e-3], Bracket.END),
        ("dropout", 0.0, [0.0, 0.1, 0.2], Bracket.CLOSED),  # nothing lies below
        ("dropout", 0.2, [0.0, 0.1, 0.2], Bracket.END),
    ],
)
def test_a_joint_optimum_is_enclosed_by_its_points_or_by_a_legal_end(name, chosen, tried, wanted):
    scale = scale_of(name, {"loguniform": [1e-4, 1e-2]} if name == "lr" else {"uniform": [0.0, 0.4]}, 2.0)
    assert enclosed(chosen, tried, scale) is wanted
