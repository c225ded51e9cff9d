"""Tests of what alpha does to a model: units in which it has no effect, and starts that equal the stock model."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

import pagating
from pagating.gating.gates import GATES
from pagating.gating.units import idle_alpha

torch.set_num_threads(1)
IDS = torch.randint(0, 37, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _only_the_built_in_gates_remain() -> Any:
    before = dict(GATES)
    yield
    GATES.clear()
    GATES.update(before)


def model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    size = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    made: PreTrainedModel
    if kind == "llama":
        made = LlamaForCausalLM(LlamaConfig(**size, **ends, intermediate_size=24))
    elif kind == "opt":
        made = OPTForCausalLM(OPTConfig(**size, **ends, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0))
    else:
        made = GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=2, n_positions=16, **ends))
    return made.eval()


def free(init: float, per: str = "layer") -> dict[str, Any]:
    return {"learnable": {"init": init, "per": per, "range": "free"}}


def said(patched: nn.Module, **arguments: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        pagating.patch(patched, **arguments)
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize(
    ("kind", "arguments", "reason"),
    [
        ("llama", {"alpha": "learnable", "base": "stock"}, "x * sigmoid(x) is the base SiLUActivation"),
        ("llama", {"alpha": 0.3, "base": "stock"}, "x * sigmoid(x) is the base SiLUActivation"),
        ("llama", {"alpha": {"schedule": {}}, "base": "stock"}, "x * sigmoid(x) is the base SiLUActivation"),
        ("opt", {"gate": "step", "alpha": [0.5, 0.0], "base": "stock"}, "x * step(x) is the base ReLU"),
        ("gpt2", {"form": "scaled", "gate": "step"}, "form scaled with gate step"),
        ("gpt2", {"gate": "one"}, "x * one(x) is the base identity"),
        ("gpt2", {"gate": "one", "form": "glu"}, "one(x) is 1"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_alpha_without_effect_is_named_once(kind: str, arguments: dict[str, Any], reason: str, device: str) -> None:
    pagating.register_gate("one", torch.ones_like)
    made = model(kind)
    with torch.device(device):
        (line,) = said(made, **arguments)
    assert line == (
        f"alpha has no effect: {reason}, so that the unit is the same at every alpha; choose another gate or base"
    )
    if device == "cpu" and arguments["alpha" if "alpha" in arguments else "gate"] == "learnable":
        made(IDS, labels=IDS).loss.backward()
        assert [alpha.parameter.grad.item() for alpha in pagating.alpha_parameters(made)] == [0.0]


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("llama", {"alpha": 0.0, "base": "stock"}),  # a control
        ("llama", {"alpha": "learnable"}),
        ("llama", {"gate": "silu", "alpha": 0.5, "base": "stock"}),
        ("llama", {"unit": "silu"}),
        ("llama", {"unit": "swish"}),
        ("opt", {"gate": "relu", "base": "stock"}),
        ("opt", {"alpha": "learnable", "base": "stock"}),
        ("gpt2", {"alpha": "learnable", "base": "xielu"}),
        ("gpt2", {"gate": "gelu", "base": "gelu"}),
    ],
)
def test_an_alpha_with_an_effect_is_left_in_peace(kind: str, arguments: dict[str, Any]) -> None:
    assert said(model(kind), **arguments) == []


def test_a_gate_of_ones_own_may_be_the_base_too() -> None:
    row = pagating.register_gate("mine", lambda x: 0.5 * (1 + torch.erf(x / 2**0.5)))
    assert idle_alpha("pointwise", "mine", nn.GELU()) == idle_alpha("pointwise", row, nn.GELU()).replace(
        "<lambda>", "mine"
    )
    assert idle_alpha("pointwise", "mine", nn.SiLU()) is None
    assert idle_alpha("pointwise", "mine", nn.PReLU()) is None


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("gpt2", {"base": "stock", "alpha": free(0.0)}),
        ("gpt2", {"base": "gelu", "alpha": free(0.0, "model")}),
        ("gpt2", {"base": "stock", "alpha": {"schedule": {"from": 0.0, "to": 1.0}}}),
        ("opt", {"base": "stock", "gate": "tanh", "alpha": free(0.0, "channel")}),
        ("opt", {"gate": "step", "alpha": free(1.0)}),
        ("llama", {"base": "stock", "gate": "tanh", "alpha": free(0.0)}),
        ("llama", {"alpha": free(1.0)}),
        ("llama", {"unit": "swish"}),
        ("llama", {"unit": "xsilu"}),
    ],
)
def test_a_neutral_start_is_the_stock_model_and_alpha_learns_from_there(kind: str, arguments: dict[str, Any]) -> None:
    made = model(kind)
    stock = made(IDS).logits
    pagating.patch(made, **arguments)
    out = made(IDS, labels=IDS)
    torch.testing.assert_close(out.logits, stock, rtol=0, atol=1e-6)
    out.loss.backward()
    assert all(alpha.parameter.grad.abs().max() > 1e-7 for alpha in pagating.alpha_parameters(made))
    pagating.unpatch(made)
    pagating.patch(made, **{**arguments, "alpha": 0.5})
    assert not torch.allclose(made(IDS).logits, stock, rtol=0, atol=1e-6)
