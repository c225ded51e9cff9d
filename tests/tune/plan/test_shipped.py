"""Tests of the plans of all shipped studies, in the default mode: hours from a calibration on this machine."""

import json
import math
from pathlib import Path

import pytest
import torch

from pagating.data.corpus import meta_digest
from pagating.trial import Trial
from tune.plan import child, plan, space
from tune.study.files import load

torch.set_num_threads(1)
ROOT = Path(__file__).parents[3]
SHIPPED = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "published").glob("*.yaml")])


def corpus_for(folder, vocab_size):
    """Write the part of a packed corpus that a trial's sizes are read from."""
    meta = {"dtype": "uint32", "vocab_size": vocab_size, "splits": {}}
    (folder / "corpus.json").write_text(json.dumps({**meta, "digest": meta_digest(meta)}))
    return folder


def test_every_shipped_study_is_here():
    assert len(SHIPPED) == 15
    assert sum(load(path).fixed.micro_batch_tokens is not None for path in SHIPPED) >= 7


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_calibration_of_a_shipped_study_is_a_trial_at_any_speed(path, tmp_path):
    study = load(path).rungs[-1]  # the largest size of a ladder
    corpus = corpus_for(tmp_path, space.vocabulary(study))
    for arm in study.arms:
        trial = plan.arm_example(study, arm, path.parent, corpus)
        size = trial.model
        flops = 72 * size["n_layer"] * size["d_model"] ** 2
        assert child.tiny(trial).steps == 1
        for seconds in (
            1e-9,
            *(flops * study.model.n_ctx / child.ROUGH_FLOPS * windows for windows in range(1, 70)),
            1e9,
        ):
            shorter, share = child.short(trial, flops, seconds)
            assert trial.batch_tokens >= shorter.batch_tokens >= study.model.n_ctx
            assert shorter.micro_batch_tokens in (None, trial.micro_batch_tokens)
            parts = trial.micro_batch_tokens or math.inf
            assert (shorter.micro_batch_tokens is None) == (shorter.batch_tokens < parts)
            assert share >= 1


@pytest.mark.parametrize("batch", [16, 32, 48, 64, 96, 256])
@pytest.mark.parametrize("micro", [16, 32, 48, 64, 96, 256])
def test_a_calibration_keeps_whole_micro_batches(tmp_path, batch, micro):
    size = {"n_layer": 1, "d_model": 8, "n_head": 2, "n_ctx": 16}
    given = {"corpus": str(corpus_for(tmp_path, 300)), "model": size, "lr": 1e-3, "tokens": 1024, "batch_tokens": batch}
    if batch % micro:
        with pytest.raises(ValueError, match=f"micro_batch_tokens={micro} is not a multiple of n_ctx=16 that divides"):
            Trial(**given, seed=1, micro_batch_tokens=micro)
        return
    for windows in range(1, 20):
        trial = Trial(**given, seed=1, micro_batch_tokens=micro)
        shorter, _ = child.short(trial, 10**6, windows * 16 * 10**6 / child.ROUGH_FLOPS * 1.01)
        affordable = min(windows * 16, batch)
        expected = affordable // micro * micro or affordable
        assert (shorter.batch_tokens, shorter.micro_batch_tokens) == (expected, micro if expected >= micro else None)


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_study_is_planned_in_the_default_mode(path, tmp_path, monkeypatch):
    """Nothing is replaced but a text that is not on this machine, by random tokens, as the command does itself."""
    monkeypatch.setenv("PAGATING_CACHE", str(tmp_path / "cache"))
    options = {"slots": None, "utilisation": 0.3, "effect": "0.5%", "noise": None, "form": "json"}
    found = json.loads(plan.run(path, tmp_path, hours_from=plan.MEASURE, **options))
    assert set(found["speeds"]) == set(load(path).arms)
    assert all(0 < speed < math.inf for speed in found["speeds"].values())
    assert 0 < found["seconds"]["wall"][0] <= found["seconds"]["wall"][1] <= found["seconds"]["wall"][2]
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]
