"""Tests of BERT's masked language model and T5's span corruption, against transformers' own losses."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from pagating.checkpoint import CheckpointFolder
from pagating.data import corpus, prepare
from pagating.evaluate import value_of
from pagating.gating.cost import cost
from pagating.tasks import denoising
from pagating.tasks.denoising import IGNORE, collapsed, cut_spans, hidden_count, mask_tokens, span_count
from pagating.train import build_model, steps, train
from pagating.trial import Trial

torch.set_num_threads(1)
MODEL = {"n_layer": 2, "d_model": 16, "n_head": 2, "n_ctx": 32}
TASKS = ("masked", "span")
TIMES = ("tokens_per_second", "seconds", "peak_rss_mb")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    base = tmp_path_factory.mktemp("text")
    (base / "train.txt").write_text(
        "".join(f"{i * 7919 % 1000} the quick brown fox jumps over it\n" for i in range(900))
    )
    return str(prepare.prepare({"files": {"train": "train.txt"}}, {"vocab_size": 280}, 32, base / "cache", base))


def make(packed, task, **changed):
    settings = {"corpus": packed, "model": MODEL, "lr": 3e-3, "tokens": 128 * 6, "batch_tokens": 128, "seed": 5}
    return Trial(**{**settings, "task": task, **changed})


def losses(trial):
    return [(row["val_nll"], row["train_nll"], row["grad_norm"]) for row in train(trial)]


# --- corruption ------------------------------------------------------------------------------------------------------


def test_bert_hides_15_percent_and_shows_80_10_10_of_it():
    tokens = np.random.default_rng(0).integers(0, 1000, (500, 200))
    inputs, targets = mask_tokens(np.random.default_rng(1), tokens, 1000)
    hidden = targets != IGNORE
    assert set(hidden.sum(1)) == {30}
    assert np.array_equal(targets[hidden], tokens[hidden])
    assert np.array_equal(inputs[~hidden], tokens[~hidden])
    masked, same = (inputs[hidden] == 1000).mean(), (inputs[hidden] == tokens[hidden]).mean()
    assert masked == pytest.approx(0.8, abs=0.015)  # 15,000 draws: over four standard errors
    assert same == pytest.approx(0.1, abs=0.012)
    assert hidden.mean(0) == pytest.approx(np.full(200, 0.15), abs=0.08)
    assert (hidden_count(3), hidden_count(128), span_count(128)) == (1, 19, 6)


def test_runs_are_made_one_sentinel_each():
    tokens = np.array([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]])
    dropped = np.array([[0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 1, 0]], dtype=bool)
    assert collapsed(tokens, dropped, 100).tolist() == [[10, 100, 13, 14, 101], [100, 21, 22, 101, 25]]


def test_t5_inputs_and_targets_give_the_window_back():
    tokens = np.random.default_rng(0).integers(0, 500, (64, 128))
    inputs, targets = cut_spans(np.random.default_rng(1), tokens, 500)
    assert inputs.shape == (64, 128 - 19 + 6)
    assert targets.shape == (64, 19 + 6 + 1)
    lengths = []
    for row, shown, said in zip(tokens.tolist(), inputs.tolist(), targets.tolist(), strict=True):
        spans, sentinel = {}, None
        for token in said:
            if token > 500:
                sentinel = token
                spans[sentinel] = []
            else:
                spans[sentinel].append(token)
        assert list(spans) == list(range(501, 508))
        assert spans.pop(507) == []
        assert [token for item in shown for token in spans.get(item, [item])] == row
        lengths += map(len, spans.values())
    assert min(lengths) == 1
    assert np.mean(lengths) == pytest.approx(19 / 6)
    with pytest.raises(ValueError, match=r"1 tokens cannot be cut into 2 spans: give a larger model\.n_ctx"):
        denoising.random_lengths(np.random.default_rng(0), 1, 1, 2)


def test_every_cut_into_spans_is_as_likely():
    lengths = denoising.random_lengths(np.random.default_rng(0), 6000, 5, 3)
    assert (lengths.sum(1) == 5).all()
    cuts, counts = np.unique(lengths, axis=0, return_counts=True)
    assert len(cuts) == 6  # 4 choose 2
    assert counts == pytest.approx(np.full(6, 1000), abs=150)  # over five standard errors


@pytest.mark.parametrize("task", TASKS)
def test_holes_depend_on_seed_and_step_alone(packed, task):
    unit = {"gate": "tanh", "alpha": 0.5}
    one, other = denoising.batches(make(packed, task)), denoising.batches(make(packed, task, unit=unit, lr=1.0))
    for step in (0, 5):
        assert all(torch.equal(a, b) for a, b in zip(one(step), other(step), strict=True))
    assert not torch.equal(one(0)[1], one(1)[1])
    assert not torch.equal(one(0)[1], denoising.batches(make(packed, task, seed=6))(0)[1])
    held = [denoising.held(make(packed, task, seed=seed), "validation")[1] for seed in (5, 6)]
    assert all(torch.equal(a, b) for a, b in zip(*held, strict=True))


# --- models and the loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [None, 64])
@pytest.mark.parametrize("task", TASKS)
def test_the_loss_is_that_of_transformers(packed, task, micro):
    trial = make(packed, task, tokens=128, micro_batch_tokens=micro)
    inputs, targets = denoising.batches(trial)(0)
    model = build_model(trial)
    expected = model(input_ids=inputs, labels=targets).loss.item()
    (row,) = train(trial)
    assert row["train_nll"] == pytest.approx(expected, rel=1e-5)
    kept, whole = denoising.held(trial, "validation")[1], build_model(trial)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    found = value_of(denoising.evaluate(model, (task, kept), 3, "float32"))
    with torch.no_grad():
        assert found == pytest.approx(model.eval()(input_ids=kept[0], labels=kept[1]).loss.item(), rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_a_gate_switched_off_is_the_stock_model_bit_for_bit(packed, task):
    off = {"gate": "sigmoid", "alpha": 0.0, "base": "stock"}
    model = {**MODEL, "dropout": 0.1}
    stock = losses(make(packed, task, model=model))
    assert losses(make(packed, task, model=model, unit=off)) == stock
    assert losses(make(packed, task, model=model, unit={**off, "base": "identity"})) != stock


@pytest.mark.parametrize(("task", "form"), [("masked", "pointwise"), ("span", "pointwise"), ("span", "glu")])
def test_arms_share_the_bits_of_what_they_share(packed, task, form):
    stock = build_model(make(packed, task)).state_dict()
    unit = {"gate": "sigmoid", "alpha": {"learnable": {"init": 0.3, "per": "layer"}}, "form": form}
    gated = build_model(make(packed, task, unit=unit)).state_dict()
    shared = [name for name in stock if name in gated and stock[name].shape == gated[name].shape]
    assert all(torch.equal(stock[name], gated[name]) for name in shared)
    replaced = 4 * 2 if form == "glu" else 0  # input and output matrix of each MLP
    assert len(shared) == len(stock) - replaced


def test_t5_learns_an_alpha_in_the_mlps_of_both_sides(packed):
    learned = {"learnable": {"init": 0.3, "per": "layer", "range": "free", "lr_multiplier": 10.0}}
    *_, row = train(make(packed, "span", unit={"gate": "sigmoid", "alpha": learned}, test=True))
    assert len(row["alpha"]) == 4
    assert row["alpha"] != pytest.approx([0.3] * 4, abs=1e-4)
    final = row["final"]
    assert final["alpha"] == pytest.approx(sum(row["alpha"]) / 4)
    assert final["test_nll"] > 0
    assert not {"val_bpb", "padded_nll"} & set(final)
    assert final["compiled"] == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_training_lowers_the_loss(packed, task):
    rows = losses(make(packed, task, tokens=128 * 40, eval_every=40))
    assert rows[-1][0] < losses(make(packed, task, tokens=128, lr=1e-9))[0][0] - 0.3


@pytest.mark.parametrize("task", TASKS)
def test_a_trial_that_was_interrupted_goes_on_to_the_same_bits(packed, task, tmp_path):
    trial = make(packed, task, model={**MODEL, "dropout": 0.1}, eval_every=3)

    def plain(row):
        kept = {k: v for k, v in row.items() if k not in (*TIMES, "final")}
        return kept | {k: v for k, v in row.get("final", {}).items() if k not in TIMES}

    whole = [plain(row) for row in train(trial)]
    checkpoints = CheckpointFolder(tmp_path / "c", every_seconds=1e9)
    for made, _ in steps(trial, checkpoints):
        if made == 3:
            checkpoints.request()
        if made == 4:
            break
    assert list((tmp_path / "c").iterdir())
    assert [plain(row) for row in train(trial, CheckpointFolder(tmp_path / "c"))] == whole


def test_flops_of_bert_are_those_of_its_layers_at_the_positions_that_they_see(packed):
    model, vocab_size = build_model(make(packed, "masked")), corpus.read_meta(packed)["vocab_size"]
    head = 16 * 16 + 16 * (vocab_size + 1)  # at every position in `cost`, only at hidden ones in a trial
    share = hidden_count(32) / 32
    expected = cost(model, 32).training_flops_per_token - 6 * head * (1 - share)
    found = denoising.training_flops_per_token("masked", vocab_size, MODEL, None)
    assert found == pytest.approx(expected, rel=1e-6)
    gated = denoising.training_flops_per_token("masked", vocab_size, MODEL, {"form": "projected"})
    assert gated - found == 6 * 2 * 2 * 64 * 64


def test_sizes_and_units_that_cannot_be_are_refused_before_training(packed):
    with pytest.raises(ValueError, match=r"base: 'gelu' has no meaning for form glu"):
        denoising.check(make(packed, "span", unit={"gate": "sigmoid", "base": "gelu", "form": "glu"}))
    with pytest.raises(
        ValueError, match=r"form: glu needs an MLP of one linear layer in and one out beside bert\.encoder"
    ):
        denoising.check(make(packed, "masked", unit={"gate": "sigmoid", "form": "glu"}))
    denoising.check(make(packed, "masked", unit={"gate": "sigmoid", "alpha": 0.5}))


@pytest.mark.slow
def test_a_causal_trial_does_not_import_transformers():
    code = "import sys, pagating.train, tune.backend.ray_trial; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
