"""Tests of saved models: loaded to the same bits, written completely or not at all, none of their code run."""

import hashlib
import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import pagating
from pagating import checkpoint, saved_model
from pagating.evaluate import mean_nll, value_of
from pagating.gating import own_check, own_gate
from pagating.saved_model import SavedModelError, load_model, read_facts, save_model
from pagating.tasks.table import task_of
from pagating.train import build_model, main, steps
from pagating.trial import Trial
from tests.studies import SNAKES

torch.set_num_threads(1)
MODEL = {"n_layer": 2, "d_model": 16, "n_head": 2, "n_ctx": 16}
LAYERS = {"learnable": {"init": 0.5, "per": "layer", "range": "free"}}
TRIALS = {
    "stock": {},
    "fixed": {"unit": {"gate": "sigmoid", "alpha": 0.5}},
    "per layer": {"unit": {"gate": "tanh", "alpha": LAYERS}},
    "per model": {"unit": {"gate": "sigmoid", "alpha": {"learnable": {"init": 0.5, "per": "model"}}}},
    "scheduled": {"unit": {"gate": "sigmoid", "alpha": {"schedule": {"kind": "cosine"}}}},
    "by token": {"unit": {"gate": "sigmoid", "alpha": {"token": {}}}},
    "glu": {"unit": {"gate": "sigmoid", "alpha": 1.0, "form": "glu"}},
    "xielu": {"unit": {"unit": "xielu"}},
    "bfloat16": {"precision": "bfloat16"},
    "BERT": {"task": "masked", "unit": {"gate": "sigmoid", "alpha": LAYERS}},
    "T5": {"task": "span", "unit": {"gate": "sigmoid", "alpha": LAYERS}},
}


def make(packed, **changed):
    size = {"tokens": 64 * 4, "batch_tokens": 64, "eval_every": 2, "eval_windows": 8, "test": True}
    return Trial(**{"corpus": packed, "model": MODEL, "lr": 3e-3, "seed": 5, **size, **changed})


def trained(trial, folder):
    """Train a trial, save its model in `folder`, and return its final metrics."""
    return list(steps(trial, None, folder))[-1][1]["final"]


def loss(model, trial, split):
    task = task_of(trial)
    return value_of(task.evaluate(model, task.held(trial, split), trial.batch_tokens // 16, trial.precision))


@pytest.mark.parametrize("changed", TRIALS.values(), ids=TRIALS)
def test_the_loaded_model_has_the_trials_losses_to_the_bit(packed, tmp_path, changed):
    trial = make(packed, **changed)
    final = trained(trial, tmp_path / "model")
    before = torch.get_rng_state()
    model = pagating.load_model(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert [loss(model, trial, split) for split in ("validation", "test")] == [final["val_nll"], final["test_nll"]]
    assert loss(build_model(trial), trial, "validation") != final["val_nll"]


@pytest.mark.parametrize("kind", ["per layer", "per model", "by token"])
def test_a_folder_with_an_alpha_without_an_axis_still_loads(packed, tmp_path, kind):
    trial = make(packed, **TRIALS[kind])
    final = trained(trial, tmp_path / "model")
    weights = tmp_path / "model" / saved_model.WEIGHTS
    tensors = load_file(weights)
    one = [name for name, tensor in tensors.items() if tensor.shape == (1,)]
    assert len(one) == {"per layer": 2, "per model": 1, "by token": 2}[kind]
    save_file({**tensors, **{name: tensors[name].reshape(()) for name in one}}, weights)
    facts = tmp_path / "model" / saved_model.FACTS
    described = json.loads(facts.read_text())
    facts.write_text(json.dumps(described | {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}))
    assert loss(pagating.load_model(tmp_path / "model"), trial, "validation") == final["val_nll"]


def test_what_it_is_and_what_it_was_trained_with_stand_beside_it(packed, tmp_path):
    final = trained(make(packed), tmp_path / "model")
    facts = read_facts(tmp_path / "model")
    assert facts["final"] == final
    assert (facts["trial"]["seed"], facts["trial"]["lr"]) == (5, 3e-3)
    assert (facts["task"], facts["vocab_size"], facts["model"], facts["unit"]) == ("causal", 280, MODEL, None)
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    theirs = ["config.json", "generation_config.json", "tokenizer_config.json"]
    assert names == sorted(
        [*theirs, "layers.json", "model.json", "model.safetensors", "samples.json", "tokenizer.json"]
    )


def test_a_tied_weight_is_kept_once_and_stays_tied(packed, tmp_path):
    trained(make(packed), tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert model.lm_head.weight is model.transformer.wte.weight
    kept = load_file(tmp_path / "model" / "model.safetensors")
    assert sum(tensor.numel() for tensor in kept.values()) == sum(p.numel() for p in model.parameters())


def test_leaving_the_model_changes_no_bit_of_the_trial(packed, tmp_path):
    clock = ("tokens_per_second", "seconds", "peak_rss_mb")
    one, other = trained(make(packed), None), trained(make(packed), tmp_path / "model")
    assert {k: v for k, v in one.items() if k not in clock} == {k: v for k, v in other.items() if k not in clock}


def test_the_folder_names_no_path_of_the_machine(packed, tmp_path):
    own = tmp_path / "hard.py"
    own.write_text(HARD)
    trial = make(packed, unit={"gate": f"{own}:hard", "alpha": 1.0})
    final = trained(trial, tmp_path / "model")
    text = (tmp_path / "model" / "model.json").read_text()
    assert str(tmp_path) not in text
    assert packed not in text
    with pytest.raises(SavedModelError, match=r"was trained with an own gate \(hard.py:hard\); give gate="):
        load_model(tmp_path / "model")
    assert loss(load_model(tmp_path / "model", gate=f"{own}:hard"), trial, "validation") == final["val_nll"]


HARD = "import torch\n\n\ndef hard(x):\n    return torch.clamp(x / 6 + 0.5, 0.0, 1.0)\n"


def test_a_kept_model_loads_though_its_gate_would_be_refused_now(packed, tmp_path, monkeypatch):
    (tmp_path / "far.py").write_text("import torch\n\n\ndef far(x):\n    return torch.exp(x) / (1 + torch.exp(x))\n")
    reference = f"{tmp_path / 'far.py'}:far"
    trial = make(packed, unit={"gate": reference, "alpha": 1.0})
    with pytest.raises(ValueError, match="is not finite at x = 100"):
        build_model(trial)
    with monkeypatch.context() as before:
        before.setattr(own_check, "FAR", ())
        final = trained(trial, tmp_path / "model")
    own_gate._loaded.clear()
    assert loss(load_model(tmp_path / "model", gate=reference), trial, "validation") == final["val_nll"]


def test_a_folder_that_is_no_path_is_refused():
    for folder in (None, 3, ["a"]):
        with pytest.raises(SavedModelError, match=r"folder: .* is not a path"):
            load_model(folder)


def test_a_fresh_process_loads_a_model_with_own_code_in_any_mode_of_torch(packed, tmp_path):
    (tmp_path / "hard.py").write_text(HARD)
    (tmp_path / "snake.py").write_text(SNAKES)
    expected = {}
    for key, code, rest in (("gate", "hard.py:hard", {"alpha": 1.0}), ("unit", "snake.py:Snake", {})):
        trial = make(packed, unit={key: str(tmp_path / code), **rest})
        trained(trial, tmp_path / key)
        model = load_model(tmp_path / key, **{key: str(tmp_path / code)})
        expected[key] = model(torch.arange(16)[None]).logits.sum().item()
    (tmp_path / "elsewhere").mkdir()
    script = """
import contextlib, json, torch, pagating
torch.set_num_threads(1)
for mode in (torch.no_grad, torch.inference_mode, contextlib.nullcontext, lambda: torch.device("meta")):
    for key, code in (("gate", "hard.py:hard"), ("unit", "snake.py:Snake")):
        with mode():
            model = pagating.load_model(f"../{key}", **{key: f"../{code}"})
        assert not any(p.is_inference() for p in model.parameters())
        loss = model(torch.arange(16)[None]).logits.sum()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        print(json.dumps([key, loss.item()]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [[key, expected[key]] for key in ("gate", "unit")] * 4


def test_another_file_than_the_trained_one_is_refused(packed, tmp_path):
    own = tmp_path / "hard.py"
    own.write_text(HARD)
    trained(make(packed, unit={"gate": f"{own}:hard", "alpha": 1.0}), tmp_path / "model")
    with pytest.raises(SavedModelError, match=r"model: was trained with hard of its file, not with torch$"):
        load_model(tmp_path / "model", gate=f"{own}:torch")
    own.write_text(HARD.replace("/ 6", "/ 5"))
    with pytest.raises(SavedModelError, match=r"hard.py is not the file that the model was trained with") as caught:
        load_model(tmp_path / "model", gate=f"{own}:hard")
    assert "\n" not in str(caught.value)
    with pytest.raises(SavedModelError, match=r"trained with an own gate \(hard.py:hard\); give gate="):
        load_model(tmp_path / "model", unit=f"{own}:hard")


def test_no_path_that_a_folder_names_is_run(packed, tmp_path):
    trained(make(packed), tmp_path / "model")
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n\n\ndef gate(x):\n    return x\n")
    path = tmp_path / "model" / "model.json"
    whole = json.loads(path.read_text())
    named = f"{trap}:gate"
    for unit in ({"gate": named, "alpha": 1.0}, {"unit": named}, {"base": named}, {"gate": named, "unit": named}):
        path.write_text(json.dumps({**whole, "unit": unit}))
        with pytest.raises(SavedModelError, match=r"was trained with an own|base: .* is not one of"):
            load_model(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_the_place_of_the_weights_is_refused(packed, tmp_path):
    trained(make(packed), tmp_path / "model")
    raw = pickle.dumps({"model": 1})
    (tmp_path / "model" / "model.safetensors").write_bytes(raw)
    path = tmp_path / "model" / "model.json"
    sha256 = saved_model._sha256(tmp_path / "model" / "model.safetensors")
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": sha256}))
    with pytest.raises(SavedModelError, match="cannot be loaded"):
        load_model(tmp_path / "model")


def test_a_model_that_cannot_be_written_costs_the_trial_nothing_and_is_said(packed, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    final = trained(make(packed), tmp_path / "file" / "model")
    assert final["val_nll"] > 0
    assert "file/model: the trained model is not kept: " in capsys.readouterr().err


def test_too_little_room_keeps_the_disk_free_for_the_ledger(packed, tmp_path, monkeypatch):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    trial = make(packed)
    note = saved_model.keep_trained(build_model(trial), trial, tmp_path / "model", {})
    assert note is not None
    assert "the trained model is not kept: it needs 1 MB, and 1 MB are free" in note
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_is_replaced_whole(packed, tmp_path, monkeypatch):
    trial = make(packed)
    model = build_model(trial)
    save_model(model, trial, tmp_path / "model", {"mark": 1})
    with monkeypatch.context() as patched:
        patched.setattr(saved_model, "write_tensors", _full)
        with pytest.raises(OSError, match="disk full"):
            save_model(model, trial, tmp_path / "model", {"mark": 2})
    assert read_facts(tmp_path / "model")["final"] == {"mark": 1}
    save_model(model, trial, tmp_path / "model", {"mark": 3})
    assert read_facts(tmp_path / "model")["final"] == {"mark": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _full(*_, **__):
    raise OSError("disk full")


def _drop(tensors):
    tensors.pop(sorted(tensors)[0])


def _widen(tensors):
    tensors[sorted(tensors)[0]] = torch.zeros(3)


@pytest.mark.parametrize(("spoil", "said"), [(_drop, "its tensors are not the model's"), (_widen, r"is \(3,\), not")])
def test_weights_of_another_model_are_refused(packed, tmp_path, spoil, said):
    save_model(build_model(make(packed)), make(packed), tmp_path / "model", {})
    weights, facts = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "model.json"
    tensors = load_file(weights)
    spoil(tensors)
    save_file(tensors, weights)
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "sha256": saved_model._sha256(weights)}))
    with pytest.raises(SavedModelError, match=said):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no JSON", "cannot be read"),
        ("[1]", "not a description of a model of format 1"),
        ('{"format": 2}', "not a description of a model of format 1"),
    ],
)
def test_what_is_no_model_is_refused_in_a_line(tmp_path, text, said):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(SavedModelError, match=said):
        load_model(tmp_path)
    with pytest.raises(SavedModelError, match="cannot be read as a model's description"):
        load_model(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"task": "other"}, "its task 'other' is not one of causal, masked, span"),
        ({"model": {**MODEL, "n_head": 3}}, "d_model=16 is not a multiple of n_head=3"),
        ({"model": {**MODEL, "heads": 3}}, "unexpected keyword argument 'heads'"),
        ({"unit": {"gate": "nothing"}}, "'nothing'"),
        ({"sha256": "0" * 64}, "it is damaged: its SHA-256 is [0-9a-f]{16}, not 0000000000000000"),
    ],
)
def test_a_description_that_fits_no_model_is_refused(packed, tmp_path, changed, said):
    save_model(build_model(make(packed)), make(packed), tmp_path / "model", {})
    path = tmp_path / "model" / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(SavedModelError, match=said):
        load_model(tmp_path / "model")


def test_one_flipped_bit_of_the_weights_is_seen(packed, tmp_path):
    save_model(build_model(make(packed)), make(packed), tmp_path / "model", {})
    weights = tmp_path / "model" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(SavedModelError, match="it is damaged"):
        load_model(tmp_path / "model")


def test_the_command_of_one_trial_leaves_its_model(packed, tmp_path, capsys):
    (tmp_path / "trial.json").write_text(json.dumps({**make(packed).__dict__}))
    assert main([str(tmp_path / "trial.json"), "--model", str(tmp_path / "model")]) == 0
    final = json.loads(capsys.readouterr().out)
    windows = task_of(make(packed)).held(make(packed), "validation")
    assert mean_nll(load_model(tmp_path / "model"), windows, 4) == final["val_nll"]
