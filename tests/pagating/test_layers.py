"""Tests of the statistics of a trained model's layers: against numpy, and without an effect on the trial."""

import json

import numpy as np
import pytest
import torch

import pagating
from pagating import layers
from pagating.data.corpus import eval_windows, open_split
from pagating.layers import LAYERS, SAMPLES, layer_rows, write_measured
from pagating.train import build_model, steps
from tests.pagating.helpers import make_trial, plain

torch.set_num_threads(1)
UNITS = {
    "stock": {},
    "fixed": {"unit": {"gate": "sigmoid", "alpha": 0.5}},
    "BERT": {"task": "masked", "unit": {"gate": "sigmoid", "alpha": 0.5}},
    "T5": {"task": "span"},
}


@pytest.mark.parametrize("changed", UNITS.values(), ids=UNITS)
def test_a_trained_models_folder_has_its_layers(packed, tmp_path, changed):
    trial = make_trial(packed, **changed)
    alone = list(steps(trial))
    rows = list(steps(trial, None, tmp_path / "model"))
    assert [plain(row) for _, row in rows if row] == [plain(row) for _, row in alone if row]
    found = json.loads((tmp_path / "model" / LAYERS).read_text())
    assert [row["layer"] for row in found] == list(range(4 if changed.get("task") == "span" else 2))
    for row in found:
        assert 1 <= row["hidden_rank"] <= row["width"] == 64
        assert row["gradient_norm"] > 0
        assert 0 <= row["negative_slope"] <= 1
        assert row["dead"] < 1
    assert ("alpha" in found[0]) == ("unit" in changed)
    assert (tmp_path / "model" / SAMPLES).exists() == ("task" not in changed)


def test_the_rank_and_the_gradient_are_those_of_the_loaded_model(packed, tmp_path):
    trial = make_trial(packed, unit={"gate": "sigmoid", "alpha": 0.5})
    list(steps(trial, None, tmp_path / "model"))
    found = json.loads((tmp_path / "model" / LAYERS).read_text())
    model = pagating.load_model(tmp_path / "model")
    windows = eval_windows(open_split(packed, "validation"), 16, trial.eval_windows)
    kept = {}

    def keep(module, inputs, output):
        kept["y"] = output.detach().double().flatten(0, -2).numpy()
        inputs[0].register_hook(lambda grad: kept.__setitem__("gradient", grad.double().numpy()))

    act = next(module for name, module in model.named_modules() if name.endswith("h.1.mlp.act"))
    act.register_forward_hook(keep)
    logits = model(input_ids=windows[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
    values = np.linalg.svd(kept["y"], compute_uv=False)
    p = values / values.sum()
    assert found[1]["hidden_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert found[1]["gradient_norm"] == pytest.approx(np.linalg.norm(kept["gradient"]), rel=1e-4)
    assert found[0]["gradient_norm"] != pytest.approx(found[1]["gradient_norm"], rel=1e-2)


def test_the_measured_model_is_left_as_it_was(packed):
    trial = make_trial(packed)
    model = build_model(trial).train()
    before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    assert len(layer_rows(model, trial)) == 2
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(not module._forward_hooks for module in model.modules())


def test_a_model_of_nan_gives_null_and_a_folder_that_is_away_a_line(packed, tmp_path):
    trial = make_trial(packed)
    model = build_model(trial)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.fill_(float("nan"))
    assert write_measured(model, trial, tmp_path) is None
    first, second = json.loads((tmp_path / LAYERS).read_text())
    assert first["hidden_rank"] > 1
    assert (second["hidden_rank"], second["openness"], second["gradient_norm"]) == (None, None, None)
    said = write_measured(model, trial, tmp_path / "none")
    assert said == f"{tmp_path / 'none'}: is kept, but its layers are not measured: No such file or directory"


def test_too_little_memory_to_measure_costs_the_trial_nothing(packed, tmp_path, monkeypatch, capsys):
    def full(model, trial):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12884901888 bytes.")

    monkeypatch.setattr(layers, "layer_rows", full)
    rows = list(steps(make_trial(packed), None, tmp_path / "model"))
    assert rows[-1][1]["final"]["val_nll"] > 0
    assert not (tmp_path / "model" / LAYERS).exists()
    said = capsys.readouterr().err
    assert said.startswith(f"pagating: {tmp_path / 'model'}: is kept, but its layers are not measured: out of")
    assert said.count("\n") == 1
    monkeypatch.setattr(layers, "layer_rows", lambda model, trial: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # an error of our own code is no reason to go on
        write_measured(build_model(make_trial(packed)), make_trial(packed), tmp_path)
