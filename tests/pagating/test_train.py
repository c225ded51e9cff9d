import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from pagating import train as loop
from pagating.data import corpus
from pagating.device import warn_of_emulation
from pagating.evaluate import bits_per_byte, mean_nll, perplexity
from pagating.model.initialise import initialise_gpt2, named_generator
from pagating.train import Diverged, Progress, Trial, build_model, build_optimizer, record_losses, train

MODEL = {"n_layer": 2, "d_model": 16, "n_head": 2, "n_ctx": 16}
GATED = {"gate": "sigmoid", "alpha": 0.0, "base": "stock"}


def make(packed, **changed):
    settings = {"corpus": packed, "model": MODEL, "lr": 3e-3, "tokens": 64 * 12, "batch_tokens": 64, "seed": 5}
    return Trial(**{**settings, **changed})


def losses(trial):
    return [(row["val_nll"], row["train_nll"], row["grad_norm"]) for row in train(trial)]


def test_gate_switched_off_is_stock_gpt2_bit_for_bit_over_a_training_run(packed):
    for activation in ("gelu_new", "gelu_pytorch_tanh"):
        model = {**MODEL, "activation": activation}
        assert losses(make(packed, model=model)) == losses(make(packed, model=model, unit=GATED))
    assert losses(make(packed)) != losses(make(packed, unit={**GATED, "base": "identity"}))


def test_the_loop_is_plain_adamw_on_the_hugging_face_model(packed):
    """Compute the same three updates with transformers and torch only."""
    trial = make(packed, tokens=64 * 3, eval_every=1, weight_decay=0.3, warmup=0.5, schedule="linear", clip=0.05)
    config = GPT2Config(
        vocab_size=corpus.read_meta(packed)["vocab_size"], n_positions=16, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    initialise_gpt2(model, 5)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), fused=True)
    windows = corpus.eval_windows(corpus.open_split(packed, "validation"), 16, 64)
    expected = []
    for step, rate in enumerate([1 / 3, 1.0, 1 / 3]):  # midpoints 1/6, 3/6, 5/6: up to the half, then linearly to 0
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        batch = corpus.train_batch(corpus.open_split(packed, "train"), 5, step, 4, 16)
        loss = F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        with torch.no_grad():
            nll = F.cross_entropy(model(windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten())
        expected.append((nll.item(), loss.item(), norm.item()))
    assert norm > 0.05  # so that clipping has an effect
    for got, wanted in zip(losses(trial), expected, strict=True):
        assert got == pytest.approx(wanted, rel=2e-6)


@pytest.mark.parametrize("micro", [16, 32])
def test_micro_batches_add_up_to_the_batch(packed, micro):
    unit = {"alpha": {"learnable": {"init": 0.3}}}
    whole, parts = make(packed, unit=unit), make(packed, unit=unit, micro_batch_tokens=micro)
    assert losses(parts) != losses(whole)
    for got, wanted in zip(losses(parts), losses(whole), strict=True):
        assert got == pytest.approx(wanted, rel=2e-5)
    assert losses(make(packed, unit=unit, micro_batch_tokens=64)) == losses(whole)


def test_same_seed_same_bits_whatever_ran_before(packed):
    trial = make(packed, model={**MODEL, "dropout": 0.2})
    first = losses(trial)
    torch.manual_seed(99)
    torch.set_num_threads(2)
    assert losses(make(packed, seed=6)) != first
    assert losses(trial) == first
    assert torch.get_num_threads() == 1


def test_parameters_of_one_name_start_from_the_same_bits_in_every_arm(packed):
    stock = build_model(make(packed)).state_dict()
    learned = {"learnable": {"init": 0.3, "per": "layer", "range": "free"}}
    gated = build_model(make(packed, unit={"gate": "sigmoid", "alpha": learned, "base": "identity"})).state_dict()
    assert set(gated) > set(stock)
    assert all(torch.equal(stock[name], gated[name]) for name in stock)
    assert not torch.equal(build_model(make(packed, seed=6)).state_dict()["lm_head.weight"], stock["lm_head.weight"])


def test_initialisation_is_gpt2s():
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=500, n_positions=64, n_embd=64, n_layer=8, n_head=2, bos_token_id=None, eos_token_id=None)
    )
    initialise_gpt2(model, 1)
    for name, parameter in model.named_parameters():
        if "ln_" in name and name.endswith("weight"):
            assert (parameter == 1).all()
        elif parameter.dim() == 1:
            assert (parameter == 0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02 / (math.sqrt(16) if "c_proj" in name else 1), rel=0.05)
    name = "transformer.h.3.mlp.c_fc.weight"
    drawn = torch.empty(64, 256).normal_(0.0, 0.02, generator=named_generator(1, name))
    assert torch.equal(model.get_parameter(name).detach(), drawn)


def test_decay_is_on_matrices_only_and_alpha_has_its_own_rate(packed):
    unit = {"gate": "sigmoid", "alpha": {"learnable": {"init": 0.5, "lr_multiplier": 7.0}}, "base": "identity"}
    trial = make(packed, unit=unit)
    model = build_model(trial)
    groups = build_optimizer(model, trial).param_groups
    assert [(group["weight_decay"], group["multiplier"]) for group in groups] == [(0.1, 1.0), (0.0, 1.0), (0.0, 7.0)]
    assert all(parameter.dim() >= 2 for parameter in groups[0]["params"])
    assert [parameter.numel() for parameter in groups[2]["params"]] == [1]
    counted = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert counted == sum(parameter.numel() for parameter in model.parameters())


def test_learned_alpha_moves_from_its_start_and_is_reported_per_layer(packed):
    learned = {"learnable": {"init": 0.3, "per": "layer", "range": "free", "lr_multiplier": 10.0}}
    rows = list(train(make(packed, unit={"gate": "sigmoid", "alpha": learned, "base": "identity"})))
    assert all(len(row["alpha"]) == 2 for row in rows)
    assert rows[-1]["alpha"] != pytest.approx([0.3, 0.3], abs=1e-4)
    assert rows[-1]["final"]["alpha"] == pytest.approx(sum(rows[-1]["alpha"]) / 2)
    assert all(row["alpha"] == [] for row in train(make(packed)))


def test_evaluation_times_and_the_last_step_always(packed):
    assert [row["step"] for row in train(make(packed, eval_every=5))] == [5, 10, 12]
    assert [row["step"] for row in train(make(packed))] == [2, 4, 6, 8, 10, 12]


def test_final_metrics(packed):
    *_, row = train(make(packed, test=True))
    final, splits = row["final"], corpus.read_meta(packed)["splits"]
    assert final["val_nll"] == row["val_nll"]
    assert final["val_ppl"] == pytest.approx(math.exp(final["val_nll"]))
    counts = splits["validation"]
    assert final["val_bpb"] == pytest.approx(final["val_nll"] / math.log(2) * counts["tokens"] / counts["bytes"])
    assert final["tokens"] == 64 * 12
    assert final["steps"] == 12
    vocab, width, layers = corpus.read_meta(packed)["vocab_size"], 16, 2
    products = 12 * layers * width**2 + vocab * width  # weights used in matrix products
    assert final["flops_per_token"] == 6 * products + 3 * 4 * layers * 16 * width  # and attention, 16 positions wide
    assert final["parameters"] == sum(p.numel() for p in build_model(make(packed)).parameters())
    assert final["test_nll"] != final["val_nll"]
    assert "test_nll" not in list(train(make(packed)))[-1]["final"]


def test_mean_nll_weighs_tokens_not_batches(packed):
    model = build_model(make(packed))
    windows = corpus.eval_windows(corpus.open_split(packed, "validation"), 16, 7)
    whole = F.cross_entropy(model(windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    for batch in (1, 3, 7):
        assert mean_nll(model, windows, batch) == pytest.approx(whole, rel=1e-6)


def test_perplexity_and_bits_per_byte_at_the_limits():
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf
    assert bits_per_byte(math.log(2), 3, 6) == pytest.approx(0.5)


def test_an_exploding_trial_raises_naming_step_and_values(packed):
    with pytest.raises(Diverged, match=r"^step \d+: loss .*(nan|inf)|^step \d+: validation loss (nan|inf)"):
        list(train(make(packed, lr=1e30, warmup=0.0, clip=1e30)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_tokens": 60}, "batch_tokens=60 is not a multiple of n_ctx=16"),
        ({"tokens": 10}, "tokens=10 is less than one step of batch_tokens=64"),
        ({"schedule": "wavy"}, "schedule='wavy' is not one of constant, linear, cosine"),
        ({"precision": "float8"}, "precision='float8' is not one of float32, bfloat16"),
        ({"device": "tpu"}, "device='tpu' is not one of cpu, cuda, auto"),
        (
            {"micro_batch_tokens": 48},
            "micro_batch_tokens=48 is not a multiple of n_ctx=16 that divides batch_tokens=64",
        ),
        ({"micro_batch_tokens": 0}, r"micro_batch_tokens=0 is not a whole number in \[2, 10\^9\]"),
        ({"lr": 0.0}, r"lr=0\.0 is not a number in \(0, inf\)"),
    ],
)
def test_bad_trials_are_refused(packed, changed, message):
    with pytest.raises(ValueError, match=message):
        make(packed, **changed)


def test_losses_of_several_steps_are_looked_at_together_and_the_first_bad_one_is_named():
    progress, unseen = Progress(losses=[1.0]), [torch.tensor([2.0, 0.5]), torch.tensor([3.0, 0.25])]
    assert record_losses(progress, unseen, 7) == 0.25
    assert (progress.losses, unseen) == ([1.0, 2.0, 3.0], [])
    for bad in ([math.nan, 1.0], [2.0, math.inf]):
        with pytest.raises(Diverged, match=rf"^step 6: loss {bad[0]}, gradient norm {bad[1]}$"):
            record_losses(progress, [torch.tensor(bad), torch.tensor([math.nan, 1.0])], 7)


def test_emulated_bfloat16_is_said_so_once(packed, capsys, monkeypatch):
    monkeypatch.setattr("pagating.device.has_bfloat16", lambda device: False)
    warn_of_emulation.cache_clear()
    for precision in ("float32", "bfloat16", "bfloat16"):
        list(train(make(packed, precision=precision, tokens=64)))
    line = "pagating: bfloat16 is emulated on this cpu; precision: float32 is faster here\n"
    assert capsys.readouterr().err == line
    warn_of_emulation.cache_clear()


@pytest.mark.slow
def test_bfloat16_and_float32_studies_agree_within_seed_noise(packed):
    """Show on six seeds that rounding changes losses and differences between arms less than the seed does."""
    arms, seeds = {"stock": None, "floor": {"alpha": 0.0}}, range(6)

    def study(precision, lr=3e-3):
        return {
            arm: np.array(
                [list(train(make(packed, unit=unit, seed=s, precision=precision, lr=lr, tokens=64 * 60)))[-1]["val_nll"]
                 for s in seeds]
            )
            for arm, unit in arms.items()
        }  # fmt: skip

    exact, rounded, slower = study("float32"), study("bfloat16"), study("float32", lr=3e-4)
    noise = exact["stock"].std(ddof=1)
    for arm in arms:
        assert 0 < abs((rounded[arm] - exact[arm]).mean()) < noise
        assert abs((slower[arm] - exact[arm]).mean()) > noise  # a tenth of the learning rate is noticed
    gaps = [losses["floor"] - losses["stock"] for losses in (exact, rounded)]
    interval = stats.ttest_rel(*gaps).confidence_interval(0.95)
    assert max(abs(interval.low), abs(interval.high)) < noise


def test_bfloat16_trains_to_about_the_same_loss(packed):
    exact, rounded = (list(train(make(packed, precision=p)))[-1]["val_nll"] for p in ("float32", "bfloat16"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.01)


def test_the_optimizer_is_torchs_bit_for_bit(packed, monkeypatch):
    trial = make(packed, unit={"gate": "tanh", "alpha": {"learnable": {"init": 0.3}}})
    mine = losses(trial)
    monkeypatch.setattr(loop, "PlainAdamW", torch.optim.AdamW)
    assert losses(trial) == mine


def test_runs_alone_from_a_json_file(packed, tmp_path, capsys):
    spec = {"corpus": packed, "model": MODEL, "lr": 3e-3, "tokens": 64 * 12, "batch_tokens": 64, "seed": 5}
    (tmp_path / "trial.json").write_text(json.dumps(spec))
    command = [sys.executable, "-X", "importtime", "-m", "pagating.train", str(tmp_path / "trial.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch.optim" in loaded
    assert "torch._dynamo" not in loaded  # two seconds, and nothing is compiled
    assert json.loads(done.stdout)["val_nll"] == losses(Trial(**spec))[-1][0]
    (tmp_path / "trial.json").write_text(json.dumps({**spec, "color": 1}))
    assert loop.main([str(tmp_path / "trial.json")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "trial.json: unknown key 'color'; did you mean" in err


# --- losses and gradients that are not finite ---------------------------------------------------------------------


def with_model(monkeypatch, change):
    """Make the loop train a model changed by `change`."""
    whole = loop.build_model

    def changed(trial):
        model = whole(trial)
        change(model)
        return model

    monkeypatch.setattr(loop, "build_model", changed)


def test_a_learning_rate_of_a_million_diverges(packed):
    with pytest.raises(Diverged, match=r"^step \d+: loss (nan|inf|\d)|^step \d+: validation loss"):
        list(train(make(packed, lr=1e6, warmup=0.0)))


def test_a_loss_that_explodes_and_stays_finite_is_reported_as_it_is(packed):
    uniform = math.log(corpus.read_meta(packed)["vocab_size"])
    rows = list(train(make(packed, lr=3.0, warmup=0.0)))
    assert all(math.isfinite(row["val_nll"]) for row in rows)
    assert max(row["val_nll"] for row in rows) > 2 * uniform


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.bias", "transformer.ln_f.weight"])
def test_a_parameter_that_is_no_number_diverges_at_the_first_step(packed, monkeypatch, name):
    def spoil(model):
        model.get_parameter(name).data.view(-1)[0] = math.nan

    with_model(monkeypatch, spoil)
    with pytest.raises(Diverged, match=r"^step 1: loss nan, gradient norm nan$"):
        list(train(make(packed)))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_no_number_diverges_though_the_loss_is_finite(packed, monkeypatch, value):
    calls = []

    def spoil(grad):
        calls.append(1)
        return torch.full_like(grad, value) if len(calls) == 3 else grad

    with_model(monkeypatch, lambda model: model.get_parameter("transformer.ln_f.bias").register_hook(spoil))
    shown = "nan" if math.isnan(value) else "inf"
    with pytest.raises(Diverged, match=rf"^step 3: loss \d+\.\d+, gradient norm {shown}$"):
        list(train(make(packed, eval_every=1)))


def test_rows_before_a_divergence_were_reported(packed, monkeypatch):
    calls = []

    def spoil(grad):
        calls.append(1)
        return grad * math.inf if len(calls) == 5 else grad

    undisturbed = losses(make(packed, eval_every=2))
    with_model(monkeypatch, lambda model: model.get_parameter("transformer.ln_f.bias").register_hook(spoil))
    seen = []
    with pytest.raises(Diverged, match=r"^step 5: "):
        seen.extend((row["val_nll"], row["train_nll"], row["grad_norm"]) for row in train(make(packed, eval_every=2)))
    assert seen == undisturbed[:2]
