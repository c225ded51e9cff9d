"""Tests of parameters against numel(), and of FLOPs against torch's own counter and by hand."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import pagating
from pagating.gating.cost import cost, cost_ratio

torch.set_num_threads(1)
N_CTX = 12
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=37, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def llama() -> LlamaForCausalLM:
    # grouped queries, and a head size that is not d_model / n_head
    config = LlamaConfig(vocab_size=37, **SIZES, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    return LlamaForCausalLM(config).eval()


def bert() -> BertModel:
    return BertModel(BertConfig(vocab_size=37, **SIZES), add_pooling_layer=False).eval()


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=37, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=3, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def bart() -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=37, d_model=16, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=40, max_position_embeddings=32,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def counted_flops_per_token(model: torch.nn.Module) -> float:
    model.set_attn_implementation("eager")  # torch does not count the products inside its fused CPU kernel
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ids = torch.ones(3, N_CTX, dtype=torch.long)
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    return counter.get_total_flops() / (3 * N_CTX)


@pytest.mark.parametrize("build", [gpt2, llama, bert, t5, bart])
def test_stock_models_agree_with_torch(build: Any) -> None:
    model = build()
    found = cost(model, N_CTX)
    assert found.flops_per_token == counted_flops_per_token(model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.alpha_parameters == 0


@pytest.mark.parametrize(
    ("unit", "alphas"),
    [
        ({"alpha": 0.5}, 0),
        ({"alpha": "learnable"}, 1),
        ({"alpha": {"learnable": {"per": "layer"}}}, 2),
        ({"alpha": {"learnable": {"per": "channel"}}}, 2 * 64),
        ({"alpha": {"token": {}}}, 2 * (64 + 1)),
        ({"unit": "swiglu"}, 0),
        ({"form": "projected", "alpha": "learnable"}, 1),
    ],
    ids=str,
)
def test_patched_models_agree_with_torch(unit: dict[str, Any], alphas: int) -> None:
    model = gpt2()
    stock = cost(model, N_CTX)
    report = pagating.patch(model, **unit)
    found = cost(model, N_CTX)
    assert found.flops_per_token == counted_flops_per_token(model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.parameters - stock.parameters == report.parameters_added
    assert found.alpha_parameters == alphas
    names = [name for name, _ in model.named_modules()]
    ratio = cost_ratio(model, N_CTX)
    assert (ratio.patched, ratio.stock) == (found, stock)
    assert ratio.parameters == found.parameters / stock.parameters
    assert ratio.flops_per_token == found.flops_per_token / stock.flops_per_token
    assert [name for name, _ in model.named_modules()] == names
    pagating.unpatch(model)


def test_gpt2_small_by_hand() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    # multiply-adds: 12 layers of 12 d^2, output projection, 2 x n_ctx x d of attention per layer; FLOPs are twice that
    expected = 2 * (12 * 12 * 768**2 + 768 * 50257 + 12 * 2 * 1024 * 768)
    found = cost(model, 1024)
    assert found.parameters == 124_439_808
    assert found.flops_per_token == expected
    assert found.training_flops_per_token == 3 * expected
    pagating.patch(model, form="projected")
    ratio = cost_ratio(model, 1024)
    assert ratio.patched.parameters == 351_005_952
    assert ratio.patched.flops_per_token - expected == 12 * 2 * 2 * 3072**2
    assert ratio.parameters == pytest.approx(351_005_952 / 124_439_808)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Linear: cost per token needs the config of a transformers model"):
        cost(torch.nn.Linear(2, 2), 8)
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not patched"):
        cost_ratio(gpt2(), 8)
