"""Tests that a resumed trial ends at the same bits as an uninterrupted one."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pagating import checkpoint
from pagating import train as loop
from pagating.checkpoint import CheckpointFolder, capture, restore
from pagating.train import build_model, build_optimizer, train
from tests.pagating.helpers import interrupt, make_trial, plain

LEARNED = {"init": 0.5, "lr_multiplier": 20.0}
UNITS = {
    "stock": None,
    "fixed": {"gate": "sigmoid", "alpha": 0.5},
    "learnable": {"gate": "sigmoid", "alpha": {"learnable": LEARNED}},
    "per layer": {"gate": "tanh", "alpha": {"learnable": {**LEARNED, "per": "layer", "range": "free"}}},
    "scheduled": {"gate": "sigmoid", "alpha": {"schedule": {"kind": "cosine"}}},
}


@pytest.fixture
def models(monkeypatch):
    """Collect every model that the loop builds."""
    made = []
    monkeypatch.setattr(loop, "build_model", lambda trial: made.append(build_model(trial)) or made[-1])
    return made


def bits(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("unit", "precision"), [*((unit, "float32") for unit in UNITS), ("fixed", "bfloat16"), ("per layer", "bfloat16")]
)
def test_interrupted_at_any_step_and_resumed_is_undisturbed_bit_for_bit(packed, tmp_path, models, unit, precision):
    trial = make_trial(packed, unit=UNITS[unit], precision=precision, clip=0.3)
    undisturbed = [plain(row) for row in train(trial)]
    assert any(row["grad_norm"] > 0.3 for row in undisturbed)  # so that clipping has an effect
    final = bits(models[-1])
    for step in range(2, trial.steps):
        interrupt(trial, tmp_path / "c", step)
        torch.manual_seed(99)  # another process has another generator
        torch.rand(step)
        assert [plain(row) for row in train(trial, CheckpointFolder(tmp_path / "c"))] == undisturbed, step
        assert all(torch.equal(tensor, final[name]) for name, tensor in models[-1].state_dict().items()), step
        assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_compiled_trial_goes_on_to_the_same_bits(packed, tmp_path):
    trial = make_trial(
        packed, unit=UNITS["per layer"], compile="always", model={**make_trial(packed).model, "dropout": 0.0}
    )
    undisturbed = [plain(row) for row in train(trial)]
    if not undisturbed[-1]["final"]["compiled"]:
        pytest.skip("no compiler here")
    interrupt(trial, tmp_path / "c", 4)
    assert [plain(row) for row in train(trial, CheckpointFolder(tmp_path / "c"))] == undisturbed


def test_saving_at_every_step_changes_nothing_and_rows_before_it_come_again_as_they_were(packed, tmp_path, monkeypatch):
    trial = make_trial(packed, test=True)
    undisturbed = [plain(row) for row in train(trial)]
    monkeypatch.setattr(CheckpointFolder, "due", lambda self: True)
    checkpoints = CheckpointFolder(tmp_path / "c", keep=True)
    first = list(train(trial, checkpoints))
    assert [plain(row) for row in first] == undisturbed
    again = list(train(trial, CheckpointFolder(tmp_path / "c")))
    assert [plain(row) for row in again] == undisturbed
    assert again[:2] == first[:2]  # rows before the last checkpoint keep their times
    assert again[-1]["final"]["seconds"] > again[0]["tokens"] / again[0]["tokens_per_second"]


def test_without_what_it_holds_a_resumed_trial_is_another_one(packed, tmp_path, monkeypatch):
    """Show that each missing part is noticed: dropout's generator, the moments, the losses since the last row."""
    trial = make_trial(packed)
    undisturbed = [plain(row) for row in train(trial)]
    whole = checkpoint.restore

    def without(part):
        def partial(model, optimizer, tensors):
            old = capture(model, optimizer)
            kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(part)}
            whole(model, optimizer, kept | {name: old[name] for name in old if name.startswith(part)})

        return partial

    for part in ("generator.", "optimizer.", "model.transformer.wte"):
        monkeypatch.setattr(loop, "restore", without(part))
        interrupt(trial, tmp_path / "c", 5)
        assert [plain(row) for row in train(trial, CheckpointFolder(tmp_path / "c"))] != undisturbed, part


def test_restore_gives_back_what_torchs_own_state_dicts_hold(packed, tmp_path):
    trial = make_trial(packed, unit=UNITS["learnable"])
    model = build_model(trial)
    optimizer = build_optimizer(model, trial)
    model.hidden(torch.arange(16)[None]).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    save_file(capture(model, optimizer), tmp_path / "x")
    with safe_open(tmp_path / "x", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    drawn = torch.rand(3)
    other = build_model(make_trial(packed, unit=UNITS["learnable"], seed=6))
    fresh = build_optimizer(other, trial)
    restore(other, fresh, tensors)
    assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    mine, theirs = optimizer.state_dict(), fresh.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for index, state in mine["state"].items():
        assert all(torch.equal(value, theirs["state"][index][name]) for name, value in state.items())
        assert {v.dtype for v in state.values()} == {v.dtype for v in theirs["state"][index].values()}


@pytest.mark.parametrize("unit", ["learnable", "per layer"])
def test_a_checkpoint_of_an_alpha_without_an_axis_continues_to_the_same_bits(packed, tmp_path, monkeypatch, unit):
    trial = make_trial(packed, unit=UNITS[unit])
    undisturbed = [plain(row) for row in train(trial)]
    squeezed = []

    def as_before(model, optimizer, tensors):
        one = {name for name, tensor in tensors.items() if tensor.shape == (1,) and not name.endswith(".step")}
        squeezed.extend(one)
        restore(model, optimizer, {name: t.reshape(()) if name in one else t for name, t in tensors.items()})

    monkeypatch.setattr(loop, "restore", as_before)
    interrupt(trial, tmp_path / "c", 4)
    assert [plain(row) for row in train(trial, CheckpointFolder(tmp_path / "c"))] == undisturbed
    layers = 1 if unit == "learnable" else 2
    assert len(squeezed) == 3 * layers  # the value and its two moments


def test_a_checkpoint_of_another_shape_is_refused(packed):
    trial = make_trial(packed)
    model = build_model(trial)
    optimizer = build_optimizer(model, trial)
    tensors = capture(model, optimizer)
    name = "model.transformer.ln_f.bias"
    with pytest.raises(ValueError, match=r"'transformer.ln_f.bias' is not the model's: \(3,\) torch.float32, \(16,\)"):
        restore(model, optimizer, {**tensors, name: torch.zeros(3)})
    with pytest.raises(ValueError, match=r"tensors are not the model's: \['transformer.ln_f.bias'\]"):
        restore(model, optimizer, {key: tensor for key, tensor in tensors.items() if key != name})
