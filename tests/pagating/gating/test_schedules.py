"""Tests of schedules against their closed forms and torch's own scheduler."""

import math

import pytest
import torch

from pagating.gating.schedules import SCHEDULES, value, warmup_then


@pytest.mark.parametrize(
    ("kind", "at_quarter", "at_half"),
    [("constant", 2.0, 2.0), ("linear", 1.75, 1.5), ("cosine", 1.0 + 0.5 * (1 + math.sqrt(0.5)), 1.5)],
)
def test_values_between_and_at_the_ends(kind: str, at_quarter: float, at_half: float) -> None:
    assert value(kind, 0.0, 2.0, 1.0) == 2.0
    assert value(kind, 0.25, 2.0, 1.0) == pytest.approx(at_quarter, abs=1e-15)
    assert value(kind, 0.5, 2.0, 1.0) == pytest.approx(at_half, abs=1e-15)
    assert value(kind, 1.0, 2.0, 1.0) == (2.0 if kind == "constant" else 1.0)


def test_cosine_equals_torch_cosine_annealing() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.3)
    for step in range(20):
        assert value("cosine", step / 20, 3.0, 0.3) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("kind", SCHEDULES)
def test_warm_up_rises_linearly_then_follows_the_kind(kind: str) -> None:
    assert warmup_then(kind, 0.0, warmup=0.2, final=0.1) == 0.0
    assert warmup_then(kind, 0.05, warmup=0.2, final=0.1) == pytest.approx(0.25)
    assert warmup_then(kind, 0.2, warmup=0.2, final=0.1) == 1.0
    assert warmup_then(kind, 0.6, warmup=0.2, final=0.1) == pytest.approx(1.0 if kind == "constant" else 0.55)
    assert warmup_then(kind, 1.0, warmup=0.2, final=0.1) == pytest.approx(1.0 if kind == "constant" else 0.1)


def test_warm_up_of_nothing_and_of_everything() -> None:
    assert warmup_then("linear", 0.0, warmup=0.0) == 1.0
    assert warmup_then("linear", 0.75, warmup=0.0) == 0.25
    assert warmup_then("cosine", 0.5, warmup=1.0) == 0.5
    assert warmup_then("cosine", 1.0, warmup=1.0) == 1.0


@pytest.mark.parametrize("fraction", [-0.01, 1.01, float("nan")])
def test_a_fraction_outside_the_unit_interval_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction: .* is outside \[0, 1\]"):
        value("linear", fraction, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"fraction: .* is outside \[0, 1\]"):
        warmup_then("linear", fraction)


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'step' is not one of constant, linear, cosine"):
        value("step", 0.5, 0.0, 1.0)
