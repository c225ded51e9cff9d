"""Tests of the pointwise unit against the naive formula: values, gradients, bits at alpha = 0 and 1."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pagating.gating.gates import GATES
from pagating.gating.units import BASES, PaGLU, ProjectedGLU, SplitGLU, expanded, glu, pointwise, scaled

ALPHAS = [-1.4, 0.0, 0.3, 0.5, 1.0, 1.5, 2.0]


def sample(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(*shape, dtype=torch.float64, generator=generator) * 3).to(dtype)


def naive(x: Tensor, alpha: float | Tensor, gate: str, base: str) -> Tensor:
    """Compute the published formula from torch's elementary functions."""
    tanh_gelu = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    left = {"identity": x, "gelu": tanh_gelu}[base]
    g = {
        "sigmoid": lambda: torch.sigmoid(x),
        "tanh": lambda: torch.tanh(x),
        "relu": lambda: x.clamp(min=0),
        "gelu": lambda: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "mish": lambda: x * torch.tanh(torch.log1p(torch.exp(x))),
        "silu": lambda: x * torch.sigmoid(x),
        "step": lambda: (x > 0).to(x.dtype),
        "linear": lambda: x,
        "normal": lambda: 0.5 * torch.erfc(-x / math.sqrt(2)),
        "arctan": lambda: 0.5 + torch.atan(x) / math.pi,
    }[gate]()
    return alpha * x * g + (1 - alpha) * left


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_value_and_gradient_match_the_naive_formula(gate: str, base: str, alpha: float) -> None:
    x, y = sample(64).requires_grad_(), sample(64).requires_grad_()
    weight = torch.linspace(-1, 1, 64, dtype=torch.float64)
    fast, slow = pointwise(x, alpha, gate, base), naive(y, alpha, gate, base)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    (fast * weight).sum().backward()
    (slow * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", [(), (5,), (3, 1)], ids=["scalar", "channel", "token"])
def test_a_tensor_alpha_gets_the_gradient_of_the_naive_formula(gate: str, base: str, shape: tuple) -> None:
    a, b = (torch.full(shape, 0.7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x, y = sample(2, 3, 5).requires_grad_(), sample(2, 3, 5).requires_grad_()
    pointwise(x, a, gate, base).square().sum().backward()
    naive(y, b, gate, base).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("base", BASES)
def test_rounding_stays_within_four_units_of_the_dtype(dtype: torch.dtype, gate: str, base: str) -> None:
    x = sample(4096, dtype=dtype)
    for alpha in (0.0, 0.5, 1.5, torch.tensor(0.7, dtype=torch.float32)):
        exact_alpha = alpha.to(dtype).double() if isinstance(alpha, Tensor) else alpha
        exact = naive(x.double(), exact_alpha, gate, base)
        # relative to the added terms, which may cancel
        scale = 1 + exact.abs() + x.double().abs() * (1 + x.double().abs())
        error = (pointwise(x, alpha, gate, base).double() - exact).abs() / scale
        assert error.max().item() <= 4 * torch.finfo(dtype).eps


def test_the_ends_keep_their_bits() -> None:
    x = sample(1000, dtype=torch.float32)
    assert pointwise(x, 0.0) is x
    assert torch.equal(pointwise(x, 1.0), F.silu(x))
    gelu_new = 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    assert torch.equal(pointwise(x, 0.0, base="gelu"), gelu_new)
    torch.testing.assert_close(pointwise(x, torch.tensor(0.0), base="gelu"), gelu_new)
    assert torch.equal(pointwise(x, 1.0, base="gelu"), F.silu(x))


def test_the_published_formula_is_acon_c() -> None:
    # arXiv 2009.04759: (p1 - p2) x sigmoid(beta (p1 - p2) x) + p2 x
    x, alpha = sample(500), 0.4
    p1, p2, beta = 1.0, 1 - alpha, 1 / alpha
    acon = (p1 - p2) * x * torch.sigmoid(beta * (p1 - p2) * x) + p2 * x
    torch.testing.assert_close(pointwise(x, alpha), acon, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_glu_matches_its_formula(gate: str) -> None:
    a, b = sample(4, 6), sample(6, 4).T
    for alpha in (*ALPHAS, torch.tensor(0.7, dtype=torch.float64)):
        expected = a * (alpha * GATES[gate].gate(b) + (1 - alpha))
        torch.testing.assert_close(glu(a, b, alpha, gate), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(glu(a, b, 0.0, gate), a)
    assert torch.equal(glu(a, b, 1.0), F.glu(torch.cat([a, b], -1)))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.702])
def test_scaled_is_swish(beta: float) -> None:
    x = sample(500)
    expected = x / (1 + torch.exp(-beta * x))
    torch.testing.assert_close(scaled(x, beta), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scaled(x, torch.tensor(beta).double()), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(scaled(x, 0.0), x / 2)


def test_expanded_widens_the_range_of_the_gate() -> None:
    x = sample(500)
    expected = x * (torch.sigmoid(x) * (1 + 2 * 0.3) - 0.3)
    torch.testing.assert_close(expanded(x, 0.3), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(expanded(x, 0.0), F.silu(x))
    ends = expanded(torch.tensor([-700.0, 700.0], dtype=torch.float64), 0.3)
    assert ends.tolist() == pytest.approx([-700 * -0.3, 700 * 1.3])


EXPANSIONS = [-3.0, -1.424, -0.5, 0.0, 0.25, 0.5, 0.99, 1.0, 1.3, 1.732, 1.9, 1.999, 2.001, 2.5, 4.0]


@pytest.mark.parametrize("alpha", EXPANSIONS)
def test_paglu_is_xsilu_up_to_a_factor(alpha: float) -> None:
    x = torch.cat([sample(500), torch.linspace(-60, 60, 1201, dtype=torch.float64)]).requires_grad_()
    close = {"rtol": 1e-12, "atol": 1e-12}
    strength, factor = (alpha - 1) / (2 - alpha), 2 - alpha
    for kind in (float, lambda value: torch.tensor(value, dtype=torch.float64)):
        paglu, xsilu = pointwise(x, kind(alpha)), factor * expanded(x, kind(strength))
        torch.testing.assert_close(paglu, xsilu, **close)
        slopes = [torch.autograd.grad(unit.sum(), x, retain_graph=True)[0] for unit in (paglu, xsilu)]
        torch.testing.assert_close(*slopes, **close)
    formula = (alpha / (1 + torch.exp(-x)) + 1 - alpha) * x
    torch.testing.assert_close(pointwise(x, alpha), formula, **close)
    if alpha not in (0.0, 1.0):  # the mirror image, and a factor that is wrong
        mirrored = (alpha - 1) * pointwise(x, alpha / (alpha - 1))
        torch.testing.assert_close(pointwise(-x, alpha), mirrored, **close)
        assert (pointwise(x, alpha) - alpha * expanded(x, strength)).abs().max() > 0.01


def test_at_alpha_two_paglu_is_even_and_no_xsilu() -> None:
    x = torch.linspace(-60, 60, 1201, dtype=torch.float64)
    even = x * torch.tanh(x / 2)
    torch.testing.assert_close(pointwise(x, 2.0), even, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pointwise(-x, 2.0), pointwise(x, 2.0), rtol=1e-12, atol=1e-12)
    for strength in (10.0, 1e3, 1e5):  # xSiLU gets there with a growing strength and a shrinking factor
        alpha = (1 + 2 * strength) / (1 + strength)
        assert ((2 - alpha) * expanded(x, strength) - even).abs().max() == pytest.approx(60 / (1 + strength), rel=0.01)


def test_the_step_gate_is_a_leaky_relu_of_slope_one_minus_alpha() -> None:
    x = sample(500)
    torch.testing.assert_close(pointwise(x, 0.75, "step"), F.leaky_relu(x, 0.25), rtol=1e-12, atol=1e-12)
    a, slope = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.75, 0.25))
    pointwise(x, a, "step").square().sum().backward()
    F.prelu(x, slope).square().sum().backward()
    assert a.grad.item() == pytest.approx(-slope.grad.item(), rel=1e-12)


def test_split_and_projected_modules_match_their_formulas() -> None:
    x = sample(2, 3, 8)
    split = SplitGLU({"learnable": {"per": "channel", "range": "free"}}, "tanh", 4).double()
    with torch.no_grad():
        split.alpha_free.copy_(torch.tensor([0.0, 0.5, 1.0, 2.0]))
    alpha = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    expected = x[..., :4] * (alpha * torch.tanh(x[..., 4:]) + (1 - alpha))
    torch.testing.assert_close(split(x), expected, rtol=1e-12, atol=1e-12)
    projected = ProjectedGLU(0.4, "sigmoid", 8).double()
    a = x @ projected.a.weight.T + projected.a.bias
    b = x @ projected.b.weight.T + projected.b.bias
    expected = a * (0.4 * torch.sigmoid(b) + 0.6)
    torch.testing.assert_close(projected(x), expected, rtol=1e-12, atol=1e-12)


def test_the_module_is_the_function() -> None:
    x = sample(2, 3, 5, dtype=torch.float32)
    assert torch.equal(PaGLU(0.3, "tanh", "gelu")(x), pointwise(x, 0.3, "tanh", "gelu"))
    assert torch.equal(PaGLU(0.0, base=F.relu)(x), F.relu(x))
    prelu = torch.nn.PReLU()
    unit = PaGLU(0.5, base=prelu)
    assert [name for name, _ in unit.named_parameters()] == ["base.weight"]
    unit(x).sum().backward()
    assert prelu.weight.grad is not None
    assert repr(PaGLU(0.25)) == "PaGLU(gate=sigmoid, alpha=0.25, base=identity)"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="base: 'relu' is not one of identity, gelu, nor a function"):
        PaGLU(0.5, base="relu")
    with pytest.raises(ValueError, match="form: 'glu' is not one of pointwise, scaled, expanded"):
        PaGLU(0.5, form="glu")
    with pytest.raises(ValueError, match="gate: 'elu' is not one of sigmoid"):
        PaGLU(0.5, gate="elu")
    with pytest.raises(ValueError, match=r"alpha: 3 is not a finite number in \[0, 2\]"):
        PaGLU(3)
