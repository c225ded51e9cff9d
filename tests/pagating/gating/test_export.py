"""Tests of exported graphs against the eager model, on batch sizes and lengths that were not traced."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import pagating
from pagating.gating.export import export_onnx, export_program, max_difference, run_onnx, run_program

torch.set_num_threads(1)
GENERATOR = torch.Generator().manual_seed(1)
INPUTS = [torch.randint(0, 37, shape, generator=GENERATOR) for shape in [(1, 1), (1, 32), (5, 7), (2, 8)]]
ALPHAS: list[Any] = [0.5, "learnable", {"token": {}}]


def gpt2(alpha: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=37, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    pagating.patch(model, alpha=alpha, base="gelu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
    return model


@pytest.mark.parametrize("alpha", ALPHAS, ids=str)
def test_torch_export_gives_the_same_logits_for_any_batch_and_length(alpha: Any) -> None:
    model = gpt2(alpha)
    program = export_program(model)
    assert max_difference(model, run_program(program), INPUTS) <= 1e-5
    assert any("alpha" in name for name in program.state_dict) == (alpha != 0.5)
    other = gpt2(alpha)
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.bias.add_(1.0)
    assert max_difference(other, run_program(program), INPUTS) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("alpha", ALPHAS, ids=str)
def test_onnx_gives_the_same_logits_for_any_batch_and_length(alpha: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = gpt2(alpha)
    path = export_onnx(export_program(model), tmp_path / "model.onnx")
    assert max_difference(model, run_onnx(path), INPUTS) <= 1e-5


def test_the_traced_example_lies_on_the_models_device() -> None:
    (example,), _ = export_program(gpt2(0.5).to("meta")).example_inputs
    assert example.device.type == "meta"


def test_refusals() -> None:
    model = gpt2(0.5)
    with pytest.raises(ValueError, match=r"example: shape \(1, 8\) is not \(B, T\) with both at least 2"):
        export_program(model, torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is in training mode; call eval\(\) before an export"):
        export_program(model.train())
