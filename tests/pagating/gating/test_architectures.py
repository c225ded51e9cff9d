"""Tests of tiny models of each named architecture: patched, trained one step, saved, loaded, and restored."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_model, save_model
from torch import nn

import pagating

torch.set_num_threads(1)
TEXT = {"vocab_size": 37, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = {**TEXT, **SIZES, "num_key_value_heads": 1, "max_position_embeddings": 32}
BERT = {**TEXT, **SIZES, "max_position_embeddings": 32}
SEQ2SEQ = {**TEXT, "decoder_start_token_id": 0}

# class, its config, MLPs, width of the last axis, name of the first activation
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], int, int, str]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        {**TEXT, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "n_inner": 24},
        2, 24, "transformer.h.0.mlp.act",
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {**TEXT, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24,
         "max_position_embeddings": 32, "attention_types": [[["global", "local"], 1]], "window_size": 4},
        2, 24, "transformer.h.0.mlp.act",
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {**BERT}, 2, 24, "gpt_neox.layers.0.mlp.act"),
    "opt": (
        "OPTForCausalLM",
        {**TEXT, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24,
         "max_position_embeddings": 32, "word_embed_proj_dim": 16},
        2, 24, "model.decoder.layers.0.activation_fn",
    ),
    "llama": ("LlamaForCausalLM", LLAMA, 2, 24, "model.layers.0.mlp.act_fn"),
    "mistral": ("MistralForCausalLM", LLAMA, 2, 24, "model.layers.0.mlp.act_fn"),
    "qwen2": ("Qwen2ForCausalLM", LLAMA, 2, 24, "model.layers.0.mlp.act_fn"),
    "gemma": ("GemmaForCausalLM", {**LLAMA, "head_dim": 8}, 2, 24, "model.layers.0.mlp.act_fn"),
    "bert": ("BertForMaskedLM", BERT, 2, 24, "bert.encoder.layer.0.intermediate.intermediate_act_fn"),
    "roberta": (
        "RobertaForMaskedLM", BERT, 2, 24, "roberta.encoder.layer.0.intermediate.intermediate_act_fn",
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        {**TEXT, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32},
        2, 24, "distilbert.transformer.layer.0.ffn.activation",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {**SEQ2SEQ, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        4, 24, "encoder.block.0.layer.1.DenseReluDense.act",
    ),
    "t5_gated": (
        "T5ForConditionalGeneration",
        {**SEQ2SEQ, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
         "feed_forward_proj": "gated-gelu"},
        4, 24, "encoder.block.0.layer.1.DenseReluDense.act",
    ),
    "bart": (
        "BartForConditionalGeneration",
        {**SEQ2SEQ, "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
         "max_position_embeddings": 32},
        3, 24, "model.encoder.layers.0.activation_fn",
    ),
    "vit": (
        "ViTForImageClassification",
        {**SIZES, "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3},
        2, 24, "",
    ),
}  # fmt: skip
GLU_SHAPED = {"gpt2", "gpt_neo", "gpt_neox", "opt", "distilbert", "t5", "bart", "vit"}


def build(name: str) -> nn.Module:
    class_name, options, *_ = ARCHITECTURES[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    return cls(cls.config_class(**options)).eval()


def inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 1, 8, 8, generator=generator), "labels": torch.tensor([0, 2])}
    ids = torch.randint(3, 37, (2, 8), generator=generator)
    return {"input_ids": ids, "labels": ids}


def loss_and_gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_patch_finds_every_mlp_and_only_them(name: str) -> None:
    model = build(name)
    *_, count, width, first = ARCHITECTURES[name]
    others = sum(p.numel() for p in model.parameters())
    report = pagating.patch(model, alpha={"learnable": {"per": "channel"}})
    assert report.count == count
    assert report.parameters_added == count * width
    assert sum(p.numel() for p in model.parameters()) == others + count * width
    assert report.names[0] == first or not first
    assert len(set(report.names)) == count


def test_activations_of_heads_are_named_and_left_alone() -> None:
    model = build("bert")
    report = pagating.patch(model)
    assert report.left == ["cls.predictions.transform.transform_act_fn"]
    assert str(report).endswith("0 parameters added; left alone: cls.predictions.transform.transform_act_fn")
    assert pagating.patch(build("llama")).left == []


@pytest.mark.parametrize("name", ["Phi3ForCausalLM", "GlmForCausalLM", "ModernBertForMaskedLM"])
@pytest.mark.parametrize("unit", [{"alpha": {"learnable": {"per": "channel"}}}, {"alpha": {"token": {}}}], ids=str)
def test_gate_and_value_in_one_projection(name: str, unit: dict[str, Any]) -> None:
    cls = getattr(transformers, name)
    options = {} if name.startswith("ModernBert") else {"num_key_value_heads": 1, "head_dim": 8}
    model = cls(cls.config_class(**BERT, **options))
    pagating.patch(model, **unit)
    model(**inputs("bert")).loss.backward()
    for alpha in pagating.alpha_parameters(model):
        assert alpha.parameter.shape in {(24,), (1,)}
        assert alpha.parameter.grad.abs().min() > 0


def test_mixers_of_tokens_are_no_mlps() -> None:
    config = transformers.MambaConfig(vocab_size=37, hidden_size=16, num_hidden_layers=2)
    with pytest.raises(ValueError, match="MambaForCausalLM: no MLP activation found"):
        pagating.patch(transformers.MambaForCausalLM(config))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_alpha_zero_over_the_stock_activation_keeps_every_bit(name: str) -> None:
    stock, patched = build(name), build(name)
    pagating.patch(patched, alpha=0.0, base="stock")
    loss, grads = loss_and_gradients(stock, inputs(name))
    patched_loss, patched_grads = loss_and_gradients(patched, inputs(name))
    assert patched_loss == loss
    assert patched_grads.keys() == grads.keys()
    for key, grad in grads.items():
        assert (grad is None and patched_grads[key] is None) or torch.equal(grad, patched_grads[key]), key
    pagating.unpatch(patched)
    assert str(patched) == str(stock)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("alpha", ["learnable", {"token": {}}])
def test_trains_saves_and_loads_to_the_same_bits(name: str, alpha: Any, tmp_path: Path) -> None:
    model, loaded = build(name), build(name)
    without = {key for key, grad in loss_and_gradients(build(name), inputs(name))[1].items() if grad is None}
    pagating.patch(model, alpha=alpha)
    _, grads = loss_and_gradients(model, inputs(name))
    assert {key for key, grad in grads.items() if grad is None} == without
    alphas = pagating.alpha_parameters(model)
    assert all(a.parameter.grad.abs().max() > 0 for a in alphas)
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    save_model(model, str(tmp_path / "model.safetensors"))
    pagating.patch(loaded, alpha=alpha)
    load_model(loaded, str(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(model(**inputs(name)).loss, loaded(**inputs(name)).loss)
    assert pagating.alpha_values(loaded) == pagating.alpha_values(model) != [0.5] * len(alphas)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_by_save_pretrained_it_is_restored_and_never_loaded_as_stock(name: str, tmp_path: Path) -> None:
    model = build(name)
    pagating.patch(model, gate="tanh", alpha={"learnable": {"init": 0.3, "per": "layer"}})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path)
    loaded = pagating.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert [key for key, _ in loaded.named_modules()] == [key for key, _ in model.named_modules()]
    assert torch.equal(loaded(**inputs(name)).logits, model(**inputs(name)).logits)
    assert pagating.alpha_values(loaded) == pagating.alpha_values(model)
    with pytest.raises(ValueError, match="this model is patched; load it with pagating"):
        type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"this model is patched; load it|Unrecognized configuration class .*PaGPT2"):
        transformers.AutoModel.from_pretrained(tmp_path)
    with pytest.raises(KeyError, match="this model is patched; load it with pagating"):
        type(model)(type(model).config_class.from_pretrained(tmp_path))  # its configuration alone


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_glu_form_where_the_mlp_is_one_layer_in_and_one_out(name: str) -> None:
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    if name not in GLU_SHAPED:
        with pytest.raises(ValueError, match="form: glu needs an MLP of one linear layer in and one out beside"):
            pagating.patch(model, form="glu")
        assert model.state_dict().keys() == before.keys()
        return
    pagating.patch(model, unit="swiglu")
    loss, grads = loss_and_gradients(model, inputs(name))
    assert torch.isfinite(torch.tensor(loss))
    assert all(g is None or g.isfinite().all() for g in grads.values())
    pagating.unpatch(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
