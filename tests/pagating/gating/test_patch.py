"""Tests of `patch` on GPT-2: replaced modules, unchanged bits, errors, and the restored model."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import XIELUActivation

import pagating
from pagating.gating.catalog import COMPETITORS
from pagating.gating.units import PaGLU

torch.set_num_threads(1)
N_LAYER = 3
NAMES = [f"transformer.h.{i}.mlp.act" for i in range(N_LAYER)]


def gpt2(activation: str = "gelu_new", seed: int = 0) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=61, n_positions=16, n_embd=16, n_layer=N_LAYER, n_head=2, activation_function=activation,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config)


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int = 6, dtype: torch.dtype = torch.float32) -> tuple[list[float], list]:
    """Return losses of a few AdamW steps with dropout, and the last gradients."""
    model.train().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens(step % 2), labels=tokens(step % 2)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("activation", "base"),
    [
        ("gelu_new", "gelu"),
        ("gelu_new", "stock"),
        ("gelu_pytorch_tanh", "gelu"),
        ("relu", "stock"),
        ("xielu", "stock"),
    ],
)
def test_alpha_zero_keeps_every_bit_of_a_training_run(activation: str, base: str, dtype: torch.dtype) -> None:
    stock = gpt2(activation)
    patched = copy.deepcopy(stock)
    pagating.patch(patched, alpha=0.0, base=base)
    (losses, grads), (patched_losses, patched_grads) = train(stock, dtype=dtype), train(patched, dtype=dtype)
    assert patched_losses == losses
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(grads, patched_grads, strict=True))


def test_alpha_zero_with_the_identity_base_is_another_model() -> None:
    stock, patched = gpt2(), gpt2()
    pagating.patch(patched, alpha=0.0)
    assert train(patched)[0] != train(stock)[0]


def test_alpha_one_is_a_gpt2_with_silu() -> None:
    patched = gpt2()
    pagating.patch(patched, alpha=1.0)
    assert train(patched)[0] == train(gpt2("silu"))[0]


def test_report_and_unpatch() -> None:
    model = gpt2()
    before = [model.get_submodule(name) for name in NAMES]
    loss = train(copy.deepcopy(model))[0]
    report = pagating.patch(model, gate="tanh", alpha={"learnable": {"per": "channel"}})
    assert report.names == NAMES
    assert report.replaced == ["NewGELUActivation"] * N_LAYER
    assert report.count == N_LAYER
    assert report.parameters_added == N_LAYER * 64
    assert "replaced 3 NewGELUActivation by PaGLU(gate=tanh" in str(report)
    assert str(report).endswith("(transformer.h.0.mlp.act .. transformer.h.2.mlp.act); 192 parameters added")
    assert pagating.unpatch(model) == NAMES
    assert [model.get_submodule(name) for name in NAMES] == before
    assert train(model)[0] == loss
    pagating.patch(model)  # a restored model may be patched again


@pytest.mark.parametrize(
    ("alpha", "names"),
    [
        ("learnable", ["transformer.h.0.mlp.act.alpha_logit"]),
        ({"learnable": {"per": "layer"}}, [f"{name}.alpha_logit" for name in NAMES]),
        ({"learnable": {"per": "channel", "range": "free"}}, [f"{name}.alpha_free" for name in NAMES]),
        ({"token": {}}, [f"{name}.alpha_{part}" for name in NAMES for part in ("weight", "bias")]),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_alpha_gets_a_gradient_and_keeps_its_name(alpha: object, names: list, checkpointing: bool) -> None:
    model = gpt2()
    stock_names = [name for name, _ in model.named_parameters()]
    pagating.patch(model, alpha=alpha)
    if checkpointing:
        model.gradient_checkpointing_enable()
    found = pagating.alpha_parameters(model)
    assert [a.name for a in found] == names
    assert [name for name, _ in model.named_parameters() if name not in stock_names] == names
    assert all(dict(model.named_parameters())[a.name] is a.parameter for a in found)
    train(model, steps=1)
    for a in found:
        assert a.parameter.grad is not None
        assert a.parameter.grad.abs().min() > 0
    assert len(pagating.alpha_values(model)) == N_LAYER


def test_gradient_of_one_alpha_a_model_is_the_sum_over_layers() -> None:
    shared, separate = gpt2(), gpt2()
    pagating.patch(shared, alpha="learnable")
    pagating.patch(separate, alpha={"learnable": {"per": "layer"}})
    train(shared, steps=1)
    train(separate, steps=1)
    total = sum(a.parameter.grad for a in pagating.alpha_parameters(separate))
    torch.testing.assert_close(pagating.alpha_parameters(shared)[0].parameter.grad, total)


def test_per_layer_list_and_schedule_reach_their_layers() -> None:
    model = gpt2()
    pagating.patch(model, alpha=[0.0, 1.0, 2.0])
    assert pagating.alpha_values(model) == [0.0, 1.0, 2.0]
    pagating.unpatch(model)
    pagating.patch(model, alpha={"schedule": {"from": 0.0, "to": 1.0}})
    pagating.set_progress(model, 0.5)
    assert pagating.alpha_values(model) == [0.5] * N_LAYER
    resumed = gpt2(seed=9)
    pagating.patch(resumed, alpha={"schedule": {"from": 0.0, "to": 1.0}})
    resumed.load_state_dict(model.state_dict())
    assert pagating.alpha_values(resumed) == [0.5] * N_LAYER


@pytest.mark.parametrize(
    ("unit", "activation"),
    [("gelu", "gelu_new"), ("linear", "linear"), ("silu", "silu"), ("relu", "relu"), ("relu2", "relu2")],
)
def test_a_known_activation_trains_as_transformers_own(unit: str, activation: str) -> None:
    patched = gpt2()
    pagating.patch(patched, unit=unit)
    assert train(patched)[0] == pytest.approx(train(gpt2(activation))[0], rel=1e-7)


def test_xielu_is_transformers_own_module_in_float32() -> None:
    model = gpt2()
    pagating.patch(model, unit="xielu")
    own = XIELUActivation(dtype=torch.float32)
    x = torch.linspace(-5, 5, 101)
    unit = model.get_submodule(NAMES[1])
    assert torch.equal(unit(x), own(x))
    assert [(name, p.dtype) for name, p in unit.named_parameters()] == [
        ("base.alpha_p", torch.float32),
        ("base.alpha_n", torch.float32),
    ]


@pytest.mark.parametrize("unit", COMPETITORS)
def test_every_known_activation_trains_and_every_parameter_gets_a_gradient(unit: str) -> None:
    model = gpt2()
    pagating.patch(model, unit=unit)
    losses, grads = train(model, steps=7)
    assert losses[-1] < losses[0]
    assert all(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize(
    ("unit", "formula"),
    [
        ("swiglu", lambda a, b: a * b * torch.sigmoid(b)),
        ("geglu", lambda a, b: a * b * 0.5 * (1 + torch.erf(b / 2**0.5))),
        ("glu", lambda a, b: a * torch.sigmoid(b)),
        ("bilinear", lambda a, b: a * b),
    ],
)
def test_gated_linear_units_match_their_formula(unit: str, formula: Callable) -> None:
    model = gpt2()
    pagating.patch(model, unit=unit)
    mlp = model.transformer.h[1].mlp.eval().double()
    h = round(2 / 3 * 64)
    assert mlp.c_fc.weight.shape == (16, 2 * h)
    assert mlp.c_proj.weight.shape == (h, 16)
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = (x @ mlp.c_fc.weight + mlp.c_fc.bias).split(h, dim=-1)
    expected = formula(a, b) @ mlp.c_proj.weight + mlp.c_proj.bias
    torch.testing.assert_close(mlp(x), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("preset", [(768, 12), (1024, 24), (1280, 36)], ids=["small", "medium", "large"])
def test_glu_matches_parameters_within_a_thousandth(preset: tuple[int, int]) -> None:
    d_model, n_layer = preset
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=d_model, n_layer=n_layer, n_head=d_model // 64))
    stock = sum(p.numel() for p in model.parameters())
    report = pagating.patch(model, form="glu")
    patched = sum(p.numel() for p in model.parameters())
    h = round(2 / 3 * 4 * d_model)
    stock_mlp = 8 * d_model**2 + 5 * d_model
    assert report.parameters_added == n_layer * (3 * d_model * h + 2 * h + d_model - stock_mlp)
    assert patched - stock == report.parameters_added
    assert abs(report.parameters_added) <= 0.001 * n_layer * stock_mlp


def test_projected_form_on_gpt2_small_has_the_published_size() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    report = pagating.patch(model, form="projected")
    assert sum(p.numel() for p in model.parameters()) == 351_005_952
    assert report.parameters_added == 12 * 2 * (3072**2 + 3072)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("form", ["glu", "projected"])
def test_the_mlp_is_linear_at_alpha_zero_and_not_beyond(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 5, 16, dtype=torch.float64, generator=generator)
    for alpha, is_linear in [(0.0, True), (0.5, False)]:
        model = gpt2().double().eval()
        pagating.patch(model, form=form, alpha=alpha)
        mlp = model.transformer.h[0].mlp
        difference = mlp(x + y) + mlp(torch.zeros_like(x)) - mlp(x) - mlp(y)
        assert (difference.abs().max().item() < 1e-15) == is_linear


@pytest.mark.parametrize("form", ["glu", "projected"])
def test_new_layers_start_by_the_models_own_rule_and_come_off_again(form: str) -> None:
    config = GPT2Config(vocab_size=61, n_positions=16, n_embd=128, n_layer=4, n_head=2, bos_token_id=0)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    stock, before = copy.deepcopy(model.state_dict()), str(model)
    pagating.patch(model, form=form, alpha="learnable")
    assert [a.name for a in pagating.alpha_parameters(model)] == ["transformer.h.0.mlp.act.alpha_logit"]
    mlp = model.transformer.h[2].mlp
    for layer in [mlp.c_fc] if form == "glu" else [mlp.act.a, mlp.act.b]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.bias.abs().max() == 0
    assert mlp.c_proj.weight.std().item() == pytest.approx(0.02 / (2 * 4) ** 0.5, rel=0.05)
    if form == "projected":
        assert torch.equal(mlp.c_proj.weight, stock["transformer.h.2.mlp.c_proj.weight"])
    losses, grads = train(model, steps=7)
    assert losses[-1] < losses[0]
    assert all(g.abs().max() > 0 for g in grads)
    pagating.unpatch(model)
    assert str(model) == before
    assert model.state_dict().keys() == stock.keys()


def test_training_mode_and_dtype_follow_the_model() -> None:
    model = gpt2().eval().to(torch.bfloat16)
    pagating.patch(model, alpha="learnable")
    unit = model.get_submodule(NAMES[0])
    assert isinstance(unit, PaGLU)
    assert not unit.training
    assert unit.alpha_logit.dtype == torch.float32
    assert model(input_ids=tokens()).logits.dtype == torch.bfloat16


def test_quantised_weights_leave_the_new_modules_in_floating_point() -> None:
    model = gpt2()
    for block in model.transformer.h:
        block.mlp.c_fc.weight = nn.Parameter(torch.zeros(16, 64, dtype=torch.int8), requires_grad=False)
    pagating.patch(model, form="projected", alpha={"token": {}})
    assert {p.dtype for p in model.transformer.h[1].mlp.act.parameters()} == {torch.float32}


def test_refusals() -> None:
    model = gpt2()
    untouched = copy.deepcopy(model)
    for arguments, message in [
        ({"gate": "swish"}, "gate: 'swish' is not one of"),
        ({"base": "relu"}, "base: 'relu' is not one of identity, gelu, stock"),
        ({"form": "dense"}, "form: 'dense' is not one of pointwise, scaled, expanded, squared, glu, projected"),
        ({"form": "glu", "base": "gelu"}, "base: 'gelu' has no meaning for form glu; allowed: identity"),
        ({"unit": "mila"}, "unit: 'mila' is not one of gelu, linear, silu, relu, relu2"),
        ({"unit": "silu", "gate": "tanh"}, "unit: 'silu' settles gate; give one or the other"),
        ({"alpha": [0.5]}, "alpha: a list of 1 for 3 layers"),
        ({"alpha": 2.5}, r"alpha: 2.5 is not a finite number in \[0, 2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            pagating.patch(model, **arguments)
    assert str(model) == str(untouched)
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not patched"):
        pagating.unpatch(model)
    pagating.patch(model)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is patched already; call pagating\.unpatch first"):
        pagating.patch(model)
    with pytest.raises(ValueError, match="patched already"):
        pagating.patch(copy.deepcopy(model))
    with pytest.raises(
        ValueError, match=r"Linear: no MLP activation found; looked for .*NewGELUActivation.*ModuleList"
    ):
        pagating.patch(nn.Linear(2, 2))


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU()], ids=["gelu", "relu"])
def test_torchs_own_encoder_calls_the_new_activation_without_gradients_too(activation: nn.Module) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, activation=activation, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    padding = torch.arange(5).expand(2, 5) > torch.tensor([[4], [2]])

    def run(model: nn.Module) -> list[torch.Tensor]:
        """Return the outputs with and without gradients. torch may compute the latter in a fused form."""
        outputs = [model(x, src_key_padding_mask=padding)]
        with torch.no_grad():
            outputs.append(model(x, src_key_padding_mask=padding))
        return [output[~padding] for output in outputs]

    stock = run(model)
    for unit in ({"alpha": 1.0, "gate": "tanh"}, {"form": "glu"}):
        pagating.patch(model, **unit)
        for patched in (model, copy.deepcopy(model)):
            with_gradients, without = run(patched)
            torch.testing.assert_close(with_gradients, without, rtol=1e-5, atol=1e-5)
            assert (without - stock[1]).abs().max() > 0.1
        pagating.unpatch(model)
        assert [layer.activation_relu_or_gelu for layer in model.layers] == [1 + isinstance(activation, nn.GELU)] * 2
        assert all(torch.equal(one, other) for one, other in zip(run(model), stock, strict=True))


class InPlace(nn.Module):
    """An MLP whose activation writes to its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


def test_a_stock_base_that_works_in_place_leaves_the_gates_input() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.ModuleList([InPlace()])), torch.randn(3, 4)
    mlp = model[0][0]
    stock, hidden = mlp.act, mlp.up(x)
    pagating.patch(model, base="stock", alpha={"learnable": {"init": 0.25}})
    y = mlp(x)
    torch.testing.assert_close(y, mlp.down(0.25 * hidden * hidden.sigmoid() + 0.75 * hidden.relu()))
    y.sum().backward()
    assert pagating.alpha_parameters(model)[0].parameter.grad.abs() > 0
    pagating.unpatch(model)
    assert mlp.act is stock
    assert stock.inplace


@pytest.mark.parametrize("unit", [{"alpha": "learnable"}, {"unit": "xielu"}, {"form": "glu"}], ids=str)
def test_a_patch_in_inference_mode_makes_parameters_that_train(unit: dict) -> None:
    model = gpt2()
    with torch.inference_mode():
        pagating.patch(model, **unit)
        alone = PaGLU({"learnable": {"per": "channel"}}, width=4)
    train(model, steps=1)
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())
    alone(torch.ones(2, 4)).sum().backward()
    assert alone.alpha_logit.grad is not None
