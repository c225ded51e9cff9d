"""Tests of the model class: saving, loading, stock checkpoints, generation, attention, remote code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import pagating
from pagating.gating.catalog import settings
from pagating.gating.hf_gpt2 import PaGPT2Config, PaGPT2LMHeadModel
from pagating.gating.saving import settled

torch.set_num_threads(1)
TINY = {
    "vocab_size": 37, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.randint(1, 37, (2, 9), generator=torch.Generator().manual_seed(1))
UNITS: list[dict[str, Any]] = [
    {},
    {"alpha": 0.5},
    {"alpha": "learnable", "base": "gelu"},
    {"alpha": {"learnable": {"per": "layer", "range": "free", "init": 1.5}}, "gate": "tanh"},
    {"alpha": [0.25, 1.5]},
    {"alpha": {"schedule": {"kind": "cosine", "from": 0.25, "to": 1.0}}},
    {"alpha": {"token": {"init": 0.3}}},
    {"unit": "xielu"},
    {"unit": "swiglu"},
    {"form": "projected", "alpha": {"learnable": {"per": "channel"}}},
]


def build(seed: int = 0, **unit: Any) -> PaGPT2LMHeadModel:
    torch.manual_seed(seed)
    return PaGPT2LMHeadModel(PaGPT2Config(**TINY, **unit)).eval()


def logits(model: torch.nn.Module, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


@pytest.fixture
def stock_folder(tmp_path: Path) -> Path:
    torch.manual_seed(4)
    GPT2LMHeadModel(GPT2Config(**TINY)).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_saved_and_loaded_by_the_auto_classes_to_the_same_bits(unit: dict[str, Any], tmp_path: Path) -> None:
    model = build(**unit)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    pagating.set_progress(model, 0.5)
    model.save_pretrained(tmp_path)
    expected = settled(settings(model.config.patch_arguments()))
    assert AutoConfig.from_pretrained(tmp_path).patch_arguments() == expected
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is PaGPT2LMHeadModel
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(model))
    assert pagating.alpha_values(loaded) == pagating.alpha_values(model)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".safetensors", ".py"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", [{}, {"alpha": 0.0, "base": "gelu"}, {"unit": "gelu"}], ids=str)
def test_a_stock_checkpoint_at_the_control_setting_gives_stock_bits(
    unit: dict[str, Any], dtype: torch.dtype, stock_folder: Path
) -> None:
    stock = GPT2LMHeadModel.from_pretrained(stock_folder, dtype=dtype)
    model, info = PaGPT2LMHeadModel.from_pretrained(stock_folder, dtype=dtype, output_loading_info=True, **unit)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert logits(model).dtype == dtype
    assert torch.equal(logits(model), logits(stock))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("alpha", "missing", "values"),
    [
        ({"learnable": {"init": 0.3}}, 1, [0.3, 0.3]),
        ({"learnable": {"init": 0.3, "per": "channel"}}, 2, [0.3, 0.3]),
        ({"learnable": {"init": 1.7, "per": "layer", "range": "free"}}, 2, [1.7, 1.7]),
        ({"schedule": {"from": 0.4, "to": 1.0}}, 2, [0.4, 0.4]),
        ({"token": {"init": 0.2}}, 4, [0.2, 0.2]),
    ],
)
def test_what_a_stock_checkpoint_lacks_starts_as_stated(
    alpha: dict[str, Any], missing: int, values: list[float], dtype: torch.dtype, stock_folder: Path
) -> None:
    torch.full((1000, 1000), torch.nan)  # so that reused memory is not zero by chance
    model, info = PaGPT2LMHeadModel.from_pretrained(stock_folder, alpha=alpha, dtype=dtype, output_loading_info=True)
    assert len(info["missing_keys"]) == missing
    assert all(".act.alpha_" in key for key in info["missing_keys"])
    assert not info["unexpected_keys"]
    assert pagating.alpha_values(model) == pytest.approx(values, rel=1e-6)
    own = [p for name, p in model.state_dict().items() if ".alpha_" in name]
    assert {p.dtype for p in own} == {torch.float32}
    assert model.transformer.wte.weight.dtype == dtype
    assert logits(model).isfinite().all()


def test_alpha_keeps_its_precision_through_a_bfloat16_checkpoint(tmp_path: Path) -> None:
    model = build(alpha={"learnable": {"init": 0.3}}).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["transformer.h.0.mlp.act.alpha_logit"].dtype == torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert pagating.alpha_values(loaded) == pagating.alpha_values(model)


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_generation_with_and_without_a_cache_agrees(unit: dict[str, Any]) -> None:
    model = build(**unit)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with_cache = model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), use_cache=True, **options)
    without = model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), use_cache=False, **options)
    assert with_cache.shape == (1, 14)
    assert torch.equal(with_cache, without)


def test_attention_kinds_checkpointing_and_resizing() -> None:
    sdpa, eager = build(alpha="learnable"), build(alpha="learnable")
    sdpa.set_attn_implementation("sdpa")
    eager.set_attn_implementation("eager")
    torch.testing.assert_close(logits(sdpa), logits(eager))

    plain, checkpointed = build(alpha="learnable").train(), build(alpha="learnable").train()
    checkpointed.gradient_checkpointing_enable()
    grads = []
    for model in (plain, checkpointed):
        torch.manual_seed(2)
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])
    assert plain.transformer.h[0].mlp.act.alpha_logit.grad.item() != 0

    before = logits(sdpa)
    sdpa.resize_token_embeddings(41, mean_resizing=False)
    assert logits(sdpa).shape == (2, 9, 41)
    torch.testing.assert_close(logits(sdpa)[..., :37], before)


def test_c_proj_keeps_the_scaled_start_of_gpt2() -> None:
    config = {**TINY, "n_embd": 128, "n_layer": 8}
    for unit in ({"alpha": 0.5}, {"form": "glu"}, {"form": "projected"}):
        torch.manual_seed(0)
        model = PaGPT2LMHeadModel(PaGPT2Config(**config, **unit))
        for block in model.transformer.h:
            assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_a_bad_setting_is_refused_when_the_model_is_built() -> None:
    with pytest.raises(ValueError, match=r"alpha: 3 is not a finite number in \[0, 2\]"):
        build(alpha=3)
    with pytest.raises(ValueError, match="gate: 'swish' is not one of"):
        build(gate="swish")


@pytest.mark.slow
def test_the_folder_loads_as_remote_code_without_this_package(tmp_path: Path) -> None:
    model = build(alpha={"learnable": {"init": 0.3}}, base="gelu")
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "hf_gpt2.PaGPT2Config",
        "AutoModelForCausalLM": "hf_gpt2.PaGPT2LMHeadModel",
    }
    script = (
        "import sys; sys.modules['pagating'] = None\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "with torch.no_grad():\n"
        "    print(type(model).__name__, model(torch.arange(1, 10)[None]).logits.double().sum().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        env={"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(torch.arange(1, 10)[None]).logits.double().sum().item()
    assert done.stdout.split() == ["PaGPT2LMHeadModel", str(expected)]
