"""Tests that an alpha that is used is a parameter of the model, whatever is removed, copied, moved, saved or loaded."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import pagating

torch.set_num_threads(1)
SIZE = {
    "vocab_size": 37,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
IDS = torch.randint(0, 37, (2, 8), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, Any] = {
    "model": "learnable",
    "model, free": {"learnable": {"range": "free"}},
    "layer": {"learnable": {"per": "layer"}},
    "channel": {"learnable": {"per": "channel"}},
    "token": {"token": {}},
    "schedule": {"schedule": {"from": 0.3}},
}
PARAMETERS = {"model": 1, "model, free": 1, "layer": 3, "channel": 3, "token": 6, "schedule": 0}


def patched(kind: str, moved: bool = False) -> GPT2LMHeadModel:
    """Return a small GPT-2 of three layers with an alpha, off its start if `moved`."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZE)).eval()
    pagating.patch(model, alpha=KINDS[kind])
    if moved:
        move(model)
    return model


@torch.no_grad()
def move(model: nn.Module) -> None:
    for i, alpha in enumerate(pagating.alpha_parameters(model)):
        alpha.parameter.add_(0.3 + 0.1 * i)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def require_whole(model: nn.Module, kind: str) -> None:
    """Check that every alpha that a forward pass reads is a parameter, in the state dict, and gets a gradient."""
    learned = {a.name: a.parameter for a in pagating.alpha_parameters(model)}
    assert {id(p) for p in learned.values()} <= {id(p) for p in model.parameters()}
    assert learned.keys() <= model.state_dict().keys()
    model.zero_grad()
    model(input_ids=IDS).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learned.values())
    before = pagating.alpha_values(model)
    move(model)
    changed = [a != b for a, b in zip(pagating.alpha_values(model), before, strict=True)]
    assert changed == [kind != "schedule"] * len(before)


def without_axis(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Return a state dict as older versions saved it: a number has shape (), and a shared one has its first name."""
    kept = {k: v for k, v in state.items() if not kind.startswith("model") or ".alpha_" not in k or ".h.0." in k}
    return {k: v.reshape(()).clone() if ".alpha_" in k and v.shape == (1,) else v.clone() for k, v in kept.items()}


def pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def saved_whole(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "keep", [slice(1, None), slice(0, 1), slice(None, None, 2)], ids=["first out", "one", "middle out"]
)
def test_layers_are_taken_out(kind: str, keep: slice) -> None:
    model = patched(kind, moved=True)
    wanted = pagating.alpha_values(model)[keep]
    model.transformer.h = model.transformer.h[keep]
    assert pagating.alpha_values(model) == wanted
    require_whole(model, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_whole])
def test_a_copy_has_parameters_of_its_own(kind: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    model = patched(kind, moved=True)
    other = copied(model)
    assert torch.equal(logits(other), logits(model))
    assert len(pagating.alpha_parameters(other)) == PARAMETERS[kind]
    before = pagating.alpha_values(model)
    require_whole(other, kind)
    assert pagating.alpha_values(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_taken_from_its_head_and_a_layer_that_is_copied(kind: str) -> None:
    model = patched(kind)
    names = [a.name for a in pagating.alpha_parameters(model.transformer)]
    assert len(names) == PARAMETERS[kind]
    assert all(name in model.transformer.state_dict() for name in names)
    model.transformer.h.append(copy.deepcopy(model.transformer.h[0]))
    require_whole(model, kind)
    assert len(pagating.alpha_values(model)) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_meta_device_and_back(kind: str) -> None:
    model, other = patched(kind, moved=True), patched(kind)
    other.to("meta")
    other.to_empty(device="cpu")
    other.tie_weights()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    assert len(pagating.alpha_parameters(other)) == PARAMETERS[kind]
    require_whole(other, kind)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_loads_strictly_with_an_axis_and_without(kind: str, assign: bool) -> None:
    model = patched(kind, moved=True)
    for state in (model.state_dict(), without_axis(model.state_dict(), kind)):
        names = set(state)
        loaded = patched(kind)
        loaded.load_state_dict(state, assign=assign)
        assert set(state) == names
        assert torch.equal(logits(loaded), logits(model))
        assert len(pagating.alpha_parameters(loaded)) == PARAMETERS[kind]
        assert {a.parameter.dim() for a in pagating.alpha_parameters(loaded)} <= {1}


def test_a_shared_alpha_that_no_name_of_it_was_saved_is_missing_under_each() -> None:
    stock = {k: v for k, v in patched("model").state_dict().items() if ".alpha_" not in k}
    model = patched("model")
    model.transformer.h = model.transformer.h[1:]
    stock = {k: v for k, v in stock.items() if ".h.2." not in k}
    missing, unexpected = model.load_state_dict(stock, strict=False)
    assert missing == [f"transformer.h.{i}.mlp.act.alpha_logit" for i in range(2)]
    assert unexpected == []
    last = {**stock, "transformer.h.1.mlp.act.alpha_logit": torch.tensor([2.0])}
    assert model.load_state_dict(last).missing_keys == []
    assert pagating.alpha_values(model) == pytest.approx([torch.sigmoid(torch.tensor(2.0)).item()] * 2)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict.*h.0.mlp.act.alpha_logit"):
        model.load_state_dict(stock)


@pytest.mark.parametrize("kind", KINDS)
def test_values_copied_into_a_state_dict_reach_the_model(kind: str) -> None:
    model, average = patched(kind, moved=True), patched(kind)
    average.transformer.h, model.transformer.h = average.transformer.h[1:], model.transformer.h[1:]
    for name, tensor in average.state_dict().items():  # as an average of weights does
        tensor.copy_(model.state_dict()[name])
    assert torch.equal(logits(average), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_safetensors(kind: str, tmp_path: Path) -> None:
    model = patched(kind, moved=True)
    save_model(model, str(tmp_path / "model"))
    save_file(without_axis(load_file(tmp_path / "model"), kind), tmp_path / "old")
    alphas = {name: tensor for name, tensor in model.state_dict().items() if ".alpha_" in name}
    save_file(alphas, tmp_path / "alphas")  # it refuses names that share memory
    for name in ("model", "old"):
        loaded = patched(kind)
        load_model(loaded, tmp_path / name)
        assert torch.equal(logits(loaded), logits(model)), name
    other = patched(kind)
    assert other.load_state_dict(load_file(tmp_path / "alphas"), strict=False).unexpected_keys == []
    assert pagating.alpha_values(other) == pagating.alpha_values(model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_class_loads_its_folder_and_an_older_one(kind: str, tmp_path: Path) -> None:
    model = pagating.PaGPT2LMHeadModel(pagating.PaGPT2Config(**SIZE, alpha=KINDS[kind])).eval()
    move(model)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    for older in (False, True):
        if older:
            save_file(without_axis(load_file(weights), kind), weights, metadata={"format": "pt"})
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert torch.equal(logits(loaded), logits(model))
        assert len(pagating.alpha_parameters(loaded)) == PARAMETERS[kind]
        require_whole(loaded, kind)
