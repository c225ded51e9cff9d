"""Known activations against computations by numpy, scipy and mpmath from the papers' formulas: values and gradients."""

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import special, stats
from torch import nn

import pagating
from pagating.gating.catalog import COMPETITORS
from pagating.gating.learned import PolyNorm, PolyReLU
from pagating.gating.units import PaGLU
from pagating.model.gpt2 import GPT2Size, activations

Array = NDArray[np.float64]
X = np.concatenate([np.linspace(-9, 9, 55), [-40.0, -1e-3, 1e-3, 40.0]])


def unit(name: str, alpha: float | None = None, width: int = 4) -> nn.Module:
    """Return a known activation in float64, as a model of the study has it."""
    arguments = {"unit": name} if alpha is None else {"unit": name, "alpha": alpha}
    (made,) = activations(GPT2Size(11, 8, width, 1, 1), arguments)
    return made.double()


def xgelu(x: Array, a: float) -> Array:
    return x * (stats.norm.cdf(x) * (1 + 2 * a) - a)


def xgelu_slope(x: Array, a: float) -> Array:
    return (1 + 2 * a) * (stats.norm.cdf(x) + x * stats.norm.pdf(x)) - a


def xatlu(x: Array, a: float) -> Array:
    return x * ((np.arctan(x) + np.pi / 2) / np.pi * (1 + 2 * a) - a)


def xatlu_slope(x: Array, a: float) -> Array:
    return (1 + 2 * a) * (np.arctan2(x, 1) / np.pi + 0.5 + x / (np.pi * (1 + x**2))) - a


def xsilu(x: Array, a: float) -> Array:
    return x * (special.expit(x) * (1 + 2 * a) - a)


def xsilu_slope(x: Array, a: float) -> Array:
    s = special.expit(x)
    return (1 + 2 * a) * s * (1 + x * (1 - s)) - a


def leaky_relu2(x: Array, a: float) -> Array:
    return np.where(x > 0, x, (1 - a) * x) ** 2


def leaky_relu2_slope(x: Array, a: float) -> Array:
    return 2 * x * np.where(x > 0, 1, (1 - a) ** 2)


FORMULAS: dict[str, tuple[Callable[[Array, float], Array], Callable[[Array, float], Array], list[float]]] = {
    "xgelu": (xgelu, xgelu_slope, [0.0, 0.3, 2.0]),
    "xatlu": (xatlu, xatlu_slope, [0.0, 0.3, 2.0]),
    "xsilu": (xsilu, xsilu_slope, [0.0, 0.3, 2.0]),
    "leaky_relu2": (leaky_relu2, leaky_relu2_slope, [0.0, 0.5, 0.75, 1.0]),
}


@pytest.mark.parametrize(("name", "alpha"), [(name, alpha) for name, row in FORMULAS.items() for alpha in row[2]])
def test_values_and_slopes_are_those_of_the_paper(name: str, alpha: float) -> None:
    value, slope, _ = FORMULAS[name]
    x = torch.tensor(X, requires_grad=True)
    y = unit(name, alpha)(x)
    np.testing.assert_allclose(y.detach().numpy(), value(X, alpha), rtol=1e-12, atol=1e-13)
    y.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), slope(X, alpha), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["xgelu", "xatlu", "xsilu"])
def test_the_strength_starts_at_zero_and_its_gradient_is_that_of_the_formula(name: str) -> None:
    value = FORMULAS[name][0]
    made, x = unit(name), torch.tensor(X)
    (parameter,) = made.parameters()
    assert parameter.item() == 0.0
    y = made(x)
    np.testing.assert_allclose(y.detach().numpy(), value(X, 0.0), rtol=1e-12, atol=1e-13)
    y.sum().backward()
    at = (value(X, 1.0) - value(X, 0.0)).sum()  # the formula is linear in the strength
    assert parameter.grad.item() == pytest.approx(at, rel=1e-12)


def test_the_arctan_gate_is_exact_far_out() -> None:
    with mpmath.workdps(40):
        for x in (-1e6, -1e3, -1.0, 0.0, 1.0, 1e3):
            exact = float(mpmath.mpf("0.5") + mpmath.atan(mpmath.mpf(x)) / mpmath.pi)
            found = pagating.GATES["arctan"].gate(torch.tensor(x, dtype=torch.float64)).item()
            assert found == pytest.approx(exact, rel=1e-15)


def test_the_defaults_are_those_of_the_sources() -> None:
    x = torch.tensor(X)
    np.testing.assert_allclose(unit("leaky_relu2")(x).numpy(), np.where(X > 0, X**2, X**2 / 4), rtol=1e-12)
    assert {name for name in ("xgelu", "xatlu", "xsilu") if COMPETITORS[name].learns_alpha} == {
        "xgelu",
        "xatlu",
        "xsilu",
    }
    for kind in (PolyReLU, PolyNorm):
        made = kind()
        assert made.weight.tolist() == pytest.approx([1 / 3] * 3)
        assert made.bias.tolist() == [0.0]


def polyrelu(x: Array, w: Array, b: float) -> Array:
    return np.asarray(np.polynomial.polynomial.polyval(np.maximum(x, 0.0), [b, *w]))


def polynorm(x: Array, w: Array, b: float) -> Array:
    """Compute the formula one token at a time with mpmath, at 40 digits."""
    rows = []
    with mpmath.workdps(40):
        for token in x:
            row = [mpmath.mpf(b)] * len(token)
            for degree, coefficient in enumerate(w, 1):
                powers = [mpmath.mpf(value) ** degree for value in token]
                size = mpmath.sqrt(mpmath.fsum(p**2 for p in powers) / len(powers) + mpmath.mpf("1e-6"))
                row = [so_far + mpmath.mpf(coefficient) * p / size for so_far, p in zip(row, powers, strict=True)]
            rows.append([float(value) for value in row])
    return np.array(rows)


@pytest.mark.parametrize(("name", "formula"), [("polyrelu", polyrelu), ("polynorm", polynorm)])
def test_polynomials_and_their_gradients(name: str, formula: Callable[[Array, Array, float], Array]) -> None:
    made = unit(name)
    generator = np.random.default_rng(0)
    x, w, b = generator.normal(0, 2, (3, 5)), generator.normal(0, 1, 3), 0.3
    base: Any = made.base
    np.testing.assert_allclose(made(torch.tensor(x)).detach().numpy(), formula(x, np.full(3, 1 / 3), 0.0), rtol=1e-6)
    with torch.no_grad():
        base.weight.copy_(torch.tensor(w))
        base.bias.fill_(b)
    given = torch.tensor(x, requires_grad=True)
    way = generator.normal(0, 1, x.shape)
    y = made(given)
    np.testing.assert_allclose(y.detach().numpy(), formula(x, w, b), rtol=1e-11, atol=1e-12)
    (y * torch.tensor(way)).sum().backward()
    step = 1e-6

    def slope(index: tuple[int, ...], array: Array) -> float:
        ends = []
        for side in (step, -step):
            moved = {"x": x, "w": w}
            name = "x" if array is x else "w"
            moved[name] = array.copy()
            moved[name][index] += side
            ends.append((formula(moved["x"], moved["w"], b) * way).sum())
        return float(ends[0] - ends[1]) / (2 * step)

    for array, found in ((x, given.grad), (w, base.weight.grad)):
        expected = np.array([slope(index, array) for index in np.ndindex(array.shape)]).reshape(array.shape)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert base.bias.grad.item() == pytest.approx(way.sum(), rel=1e-12)


@pytest.mark.parametrize("name", ["polyrelu", "polynorm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cube_does_not_overflow_in_a_small_dtype(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[60.0, -3.0, 0.5, -0.0]], dtype=dtype)
    small = {"polyrelu": PolyReLU, "polynorm": PolyNorm}[name]().to(dtype)
    exact = type(small)().double()
    with torch.no_grad():
        exact.weight.copy_(small.weight)
    assert small(x).dtype == dtype
    if dtype == torch.float16 and name == "polyrelu":
        return  # 60^3 / 3 is above the largest number of float16
    torch.testing.assert_close(small(x).double(), exact(x.double()), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("name", ["xgelu", "xatlu", "leaky_relu2", "polyrelu", "polynorm"])
def test_a_hugging_face_model_takes_it_and_every_parameter_learns(name: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=37, **size))
    report = pagating.patch(model, unit=name)
    added = {"xgelu": 2, "xatlu": 2, "leaky_relu2": 0, "polyrelu": 8, "polynorm": 8}[name]
    assert (report.count, report.parameters_added) == (2, added)
    ids = torch.arange(16).reshape(2, 8)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_a_squared_form_squares_the_unit_of_its_gate() -> None:
    x = torch.linspace(-5, 5, 41, dtype=torch.float64)
    inner = 0.3 * x * torch.tanh(x) + 0.7 * x
    torch.testing.assert_close(PaGLU(0.3, "tanh", form="squared")(x), inner.square())
    assert COMPETITORS["leaky_relu2"].has_alpha
