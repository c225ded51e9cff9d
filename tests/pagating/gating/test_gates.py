"""Tests of each row of the gate table against its formula, its derivative, its range and its limits."""

import math

import pytest
import torch

from pagating.gating.gates import GATES, gate_row

# naive formulas that every faster form must match
NAIVE = {
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)),
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "step": lambda x: 0 * x + torch.where(x > 0, 1.0, 0.0),
    "normal": lambda x: 0.5 * torch.erfc(-x / math.sqrt(2)),
    "arctan": lambda x: (torch.atan(x) + math.pi / 2) / math.pi,
    "linear": lambda x: x,
}
X = torch.linspace(-12, 12, 2001, dtype=torch.float64)


def test_the_table_starts_with_the_published_gates() -> None:
    assert list(GATES) == list(NAIVE)
    assert [GATES[name].unit for name in list(GATES)[:6]] == [
        "paGLU", "paGTU", "paReGLU", "paGELU", "paMishU", "paSiLU",
    ]  # fmt: skip


@pytest.mark.parametrize("name", GATES)
def test_gate_and_product_match_the_formula_and_its_derivative(name: str) -> None:
    for function, naive in [
        (GATES[name].gate, NAIVE[name]),
        (GATES[name].gated, lambda x: x * NAIVE[name](x)),
    ]:
        x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
        fast, slow = function(x), naive(y)
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
        slow.sum().backward()
        if fast.requires_grad:
            fast.sum().backward()
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
        else:  # a step has no gradient
            assert y.grad.abs().max() == 0


@pytest.mark.parametrize("name", GATES)
def test_range_is_reached_and_not_left(name: str) -> None:
    low, high = GATES[name].range
    x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    values = GATES[name].gate(x * 1e12 if name == "arctan" else x)  # its ends are approached as 1/x
    if math.isinf(low):
        assert values.min().item() == pytest.approx(-40.0)
    else:
        assert values.min().item() == pytest.approx(low, abs=1e-8)
        assert values.min().item() >= low - 1e-12
    if name == "step":
        assert set(values.tolist()) == {0.0, 1.0}
    elif math.isinf(high):
        assert values.max().item() == pytest.approx(40.0)
    else:
        assert values.max().item() == pytest.approx(high, abs=1e-12)


@pytest.mark.parametrize("name", GATES)
def test_limits_of_the_product(name: str) -> None:
    far = torch.tensor([-600.0, 600.0], dtype=torch.float64)
    for end, value in zip(GATES[name].limits, GATES[name].gated(far).tolist(), strict=True):
        slow = name == "arctan"  # its ends are approached as 1/x
        assert value >= 600.0 - slow if math.isinf(end) else abs(value - end) < (1e-6 if slow else 1e-200)
    assert GATES[name].gated(torch.tensor(math.inf)).item() == math.inf
    assert GATES[name].gated(torch.tensor(math.nan)).isnan()


def test_an_unknown_gate_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="gate: 'swish' is not one of sigmoid, tanh, relu, gelu, mish, silu"):
        gate_row("swish")
