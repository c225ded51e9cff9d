"""Tests of the samples of a trained model: what the loaded model writes, in a process of its own too."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

import pagating
from pagating.data.corpus import open_split
from pagating.layers import SAMPLES
from pagating.tasks.samples import sample_rows
from pagating.train import build_model, steps
from tests.pagating.helpers import make_trial

torch.set_num_threads(1)
GATE = {"unit": {"gate": "sigmoid", "alpha": {"learnable": {"per": "layer"}}}}


def samples(folder):
    return json.loads((folder / SAMPLES).read_text())


@pytest.mark.parametrize("changed", [{}, GATE], ids=["stock", "gate"])
def test_the_loaded_model_writes_the_samples(packed, tmp_path, changed):
    trial = make_trial(packed, lr=3e-2, **changed)
    list(steps(trial, None, tmp_path / "model"))
    model, found = pagating.load_model(tmp_path / "model"), samples(tmp_path / "model")
    tokens = open_split(packed, "validation")
    windows = (len(tokens) - 1) // 16
    draws = np.random.Generator(np.random.Philox(1)).random((16, 3))
    assert len(found) == 3
    for place, row in enumerate(found):
        assert [len(row[name]) for name in ("prompt", "text", "greedy", "sampled")] == [8, 8, 8, 8]  # n_ctx is 16
        start = round(place * (windows - 1) / 2) * 16
        assert row["prompt"] + row["text"] == tokens[start : start + 16].tolist()
        for name in ("greedy", "sampled"):
            ids = row["prompt"] + row[name]
            chances = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1).detach().numpy()
            for position in range(8, 16):
                summed = chances[position - 1].cumsum()
                drawn = np.searchsorted(summed, draws[position, place] * summed[-1], side="right")
                expected = {"greedy": chances[position - 1].argmax(), "sampled": drawn}
                assert ids[position] == expected[name]
    assert any(row["greedy"] != row["sampled"] for row in found)
    assert any(one["sampled"] != other["sampled"] for one, other in pairwise(found))


def test_the_model_and_the_random_generators_are_left_as_they_were(packed):
    trial = make_trial(packed)
    model = build_model(trial).train()
    before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    of_numpy = np.random.get_state()[1].tolist()
    assert sample_rows(model, trial) == sample_rows(model, trial)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert np.random.get_state()[1].tolist() == of_numpy


def test_a_model_of_nan_or_of_two_positions_has_samples_and_a_denoiser_none(packed):
    trial = make_trial(packed)
    model = build_model(trial)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.fill_(float("nan"))
    assert len(sample_rows(model, trial)) == 3
    short = make_trial(packed, model={"n_layer": 1, "d_model": 8, "n_head": 2, "n_ctx": 2})
    assert [len(row["prompt"]) + len(row["greedy"]) for row in sample_rows(build_model(short), short)] == [2, 2, 2]
    assert sample_rows(model, make_trial(packed, task="span")) == []
