"""Tests of alpha: specifications, start values, names, precision, schedules, and error messages."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from pagating.gating.alpha import AlphaModule, alpha_parameters, alpha_values, parse, set_progress
from pagating.gating.units import PaGLU


def logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


def stack(alpha: object, n_layer: int = 3, width: int = 4) -> nn.ModuleList:
    units: list[PaGLU] = []
    for layer in range(n_layer):
        per_model = parse(alpha).options.get("per") == "model"
        units.append(PaGLU(alpha, width=width, layer=layer, owner=units[0] if per_model and units else None))
    return nn.ModuleList(units)


def test_defaults_are_filled_in() -> None:
    default = {"init": 0.5, "per": "model", "range": "unit", "lr_multiplier": 10.0}
    assert parse("learnable").options == default
    assert parse({"learnable": None}).options == default
    assert parse({"learnable": {"per": "layer"}}).options == {**default, "per": "layer"}
    assert parse({"schedule": {"kind": "cosine", "to": 1.5}}).options == {
        "kind": "cosine",
        "from": 0.0,
        "to": 1.5,
    }
    assert parse(1).values == (1.0,)
    assert parse(np.float32(0.5)).values == parse(np.float64(0.5)).values == (0.5,)
    assert parse(list(np.linspace(0, 1, 3, dtype=np.float32))).values == (0.0, 0.5, 1.0)
    assert parse([-1.4, 0.0, 2.5], n_layer=3).values == (-1.4, 0.0, 2.5)
    assert parse([-10, 10]).values == (-10.0, 10.0)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (2.1, r"^alpha: 2.1 is not a finite number in \[0, 2\]$"),
        (-0.1, r"^alpha: -0.1 is not"),
        (math.nan, r"^alpha: nan is not"),
        (True, r"^alpha: True is not"),
        (None, r"^alpha: None is not"),
        ([0.5, "1e-3", 1.0], r"^alpha\[1\]: '1e-3' is not"),
        ([0.5, -10.1, 1.0], r"^alpha\[1\]: -10.1 is not a finite number in \[-10, 10\]$"),
        ([0.5, 0.5], r"^alpha: a list of 2 for 3 layers"),
        ([], r"^alpha: an empty list; give one number per layer$"),
        ("learned", r"^alpha: 'learned' is neither"),
        ({"learnable": {"inti": 0.5}}, r"learnable: unknown key 'inti'; did you mean 'init'\? allowed:"),
        ({"sheduled": {}}, r"^alpha: unknown key 'sheduled'; did you mean 'schedule'\?"),
        ({}, r"^alpha: \{\} has 0 keys; give exactly one of learnable, schedule, token$"),
        ({"learnable": {}, "token": {}}, r"has 2 keys"),
        ({"learnable": 0.5}, r"^alpha.learnable: 0.5 is not a mapping"),
        ({"learnable": {"init": 1.0}}, r"^alpha.learnable.init: 1.0 has no finite logit.*or range: free$"),
        ({"learnable": {"init": 0}}, r"^alpha.learnable.init: 0.0 has no finite logit"),
        ({"token": {"init": 0.0}}, r"^alpha.token.init: 0.0 has no finite logit; .*between 0 and 1$"),
        ({"learnable": {"per": "head"}}, r"learnable.per: 'head' is not one of model, layer, channel$"),
        ({"learnable": {"range": "open"}}, r"^alpha.learnable.range: 'open' is not one of unit, free$"),
        ({"learnable": {"lr_multiplier": -1}}, r"^alpha.learnable.lr_multiplier: -1 is not"),
        ({"schedule": {"kind": "step"}}, r"schedule.kind: 'step' is not one of constant, linear, cosine$"),
        ({"schedule": {"from": 3}}, r"schedule.from: 3 is not a finite number in \[0, 2\]$"),
    ],
)  # fmt: skip
def test_bad_specifications_are_refused_in_one_line(alpha: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse(alpha, n_layer=3)
    assert "\n" not in str(caught.value)


def test_starts_are_exact_and_draw_no_random_number() -> None:
    state = torch.get_rng_state()
    model = stack({"learnable": {"init": 0.3, "per": "layer", "lr_multiplier": 7}})
    assert torch.equal(torch.get_rng_state(), state)
    found = alpha_parameters(model)
    assert [a.name for a in found] == ["0.alpha_logit", "1.alpha_logit", "2.alpha_logit"]
    assert [a.parameter.item() for a in found] == pytest.approx([logit(0.3)] * 3, rel=1e-7)
    assert [a.lr_multiplier for a in found] == [7.0] * 3
    assert alpha_values(model) == pytest.approx([0.3] * 3, rel=1e-6)


def test_one_alpha_a_model_is_one_parameter_of_every_layer() -> None:
    model = stack("learnable")
    assert [name for name, _ in model.named_parameters()] == ["0.alpha_logit"]
    assert list(model.state_dict()) == ["0.alpha_logit", "1.alpha_logit", "2.alpha_logit"]
    assert model[0].alpha_logit is model[1].alpha_logit is model[2].alpha_logit
    for each in (model, copy.deepcopy(model)):
        with torch.no_grad():
            each[2].alpha_logit.fill_(logit(0.9))
        assert alpha_values(each) == pytest.approx([0.9] * 3, rel=1e-6)
    x = torch.randn(5, 4)
    model[2](x).sum().backward()
    assert model[0].alpha_logit.grad is not None
    assert model[0].alpha_logit.grad.item() != 0.0


@pytest.mark.parametrize(
    "alpha", ["learnable", {"learnable": {"per": "layer", "range": "free"}}, {"token": {}}], ids=str
)
def test_every_parameter_has_one_axis_and_one_number_has_shape_1(alpha: object) -> None:
    shapes = {a.name.rpartition(".")[2]: tuple(a.parameter.shape) for a in alpha_parameters(stack(alpha))}
    assert shapes in ({"alpha_logit": (1,)}, {"alpha_free": (1,)}, {"alpha_weight": (4,), "alpha_bias": (1,)})
    unit = PaGLU(alpha, width=1)
    assert unit(torch.ones(2, 3, 1)).shape == (2, 3, 1)
    assert unit(torch.ones(1)).shape == (1,)
    assert torch.as_tensor(unit.alpha()).shape == ()


@pytest.mark.parametrize("alpha", [{"learnable": {"per": "channel"}}, {"token": {}}], ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (3, 4), ()])
def test_another_last_axis_than_the_width_is_refused(alpha: object, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"width: 8 is not the last axis of an input of shape \("):
        PaGLU(alpha, width=8)(torch.ones(shape))


def test_a_shared_alpha_follows_the_input_to_its_device() -> None:
    first = PaGLU("learnable")
    second = PaGLU("learnable", owner=first)
    x = torch.empty(2, 3, device="meta")
    assert second.alpha(x).device == second(x).device == torch.device("meta")
    assert second.alpha().device == torch.device("cpu")


def test_free_range_stores_alpha_itself_beyond_one() -> None:
    model = stack({"learnable": {"range": "free", "init": 1.5, "per": "layer"}})
    assert [a.name for a in alpha_parameters(model)] == [f"{i}.alpha_free" for i in range(3)]
    assert alpha_values(model) == [1.5] * 3


def test_one_alpha_a_channel_and_its_mean() -> None:
    model = stack({"learnable": {"per": "channel", "range": "free"}})
    with torch.no_grad():
        model[1].alpha_free.copy_(torch.tensor([0.0, 0.5, 1.0, 2.0]))
    assert alpha_values(model) == [0.5, 0.875, 0.5]
    assert sum(p.numel() for p in model.parameters()) == 3 * 4
    with pytest.raises(ValueError, match="the size of the last axis is needed; give width"):
        PaGLU({"learnable": {"per": "channel"}})


def test_token_dependent_alpha_is_the_sigmoid_of_a_projection() -> None:
    unit = PaGLU({"token": {"init": 0.25}}, width=4).double()
    assert sum(p.numel() for p in unit.parameters()) == 4 + 1
    assert alpha_values(unit) == pytest.approx([0.25], rel=1e-6)
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        unit.alpha_weight.copy_(torch.tensor([0.1, -0.2, 0.3, 0.4]))
    expected = torch.sigmoid((x * unit.alpha_weight).sum(-1, keepdim=True) + unit.alpha_bias)
    torch.testing.assert_close(unit.alpha(x), expected, rtol=1e-12, atol=1e-12)


def test_a_list_gives_each_layer_its_own() -> None:
    assert alpha_values(stack([0.0, 0.25, 2.0])) == [0.0, 0.25, 2.0]
    assert alpha_parameters(stack([0.0, 0.25, 2.0])) == []
    with pytest.raises(ValueError, match="layer: 3 is not below 3, the length of the list of alpha"):
        PaGLU([0.0, 0.25, 2.0], layer=3)


def test_a_schedule_moves_with_progress_and_resumes_from_the_state_dict() -> None:
    spec = {"schedule": {"kind": "linear", "from": 0.5, "to": 1.5}}
    model, resumed = stack(spec), stack(spec)
    assert alpha_values(model) == [0.5] * 3
    set_progress(model, 0.25)
    assert alpha_values(model) == [0.75] * 3
    resumed.load_state_dict(model.state_dict())
    assert alpha_values(resumed) == [0.75] * 3
    set_progress(model, 1.0)
    assert alpha_values(model) == [1.5] * 3
    with pytest.raises(ValueError, match=r"fraction: 1.5 is not a finite number in \[0, 1\]"):
        set_progress(model, 1.5)


def test_alpha_keeps_float32_when_the_model_is_cast_down_and_follows_it_up() -> None:
    for spec in ("learnable", {"schedule": {"from": 0.3}}, {"token": {"init": 0.3}}):
        model = nn.Sequential(nn.Linear(4, 4), *stack(spec))
        before = alpha_values(model)
        model.to(torch.bfloat16)
        assert model[0].weight.dtype == torch.bfloat16
        own = [t for m in model.modules() if isinstance(m, AlphaModule) for _, t in m.named_own_alpha()]
        assert {t.dtype for t in own} == {torch.float32}
        assert alpha_values(model) == before
        assert model(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
        model.double()
        assert {t.dtype for t in own if isinstance(t, nn.Parameter)} <= {torch.float64}


def test_a_gradient_keeps_the_precision_of_its_alpha() -> None:
    unit = PaGLU("learnable")
    unit(torch.randn(3, 4)).sum().backward()
    grad = unit.alpha_logit.grad.clone()
    unit.to(torch.bfloat16)
    assert unit.alpha_logit.grad.dtype == torch.float32
    assert torch.equal(unit.alpha_logit.grad, grad)


def test_an_unpatched_model_has_none() -> None:
    model = nn.Linear(3, 3)
    assert alpha_parameters(model) == []
    assert alpha_values(model) == []
    set_progress(model, 0.5)
