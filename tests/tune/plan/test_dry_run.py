"""Tests of the warning of `pagating try` that a healthy trial would be taken for a hung one."""

from dataclasses import replace

import pytest

from pagating.tasks import causal
from pagating.trial import Trial
from tests.studies import SMALL, study_of
from tune.plan import child, dry_run
from tune.plan.dry_run import Tried


@pytest.mark.parametrize(
    ("tried", "batch_tokens", "seconds"),
    [
        (Tried("a", step_seconds=899.0, silence=1.0), 64, None),  # 64 tokens are the study's whole batch
        (Tried("a", step_seconds=900.0, silence=1.0), 64, 300),
        (Tried("a", step_seconds=450.0, silence=1.0), 32, 300),
        (Tried("a", step_seconds=10.0, silence=299.0), 64, None),
        (Tried("a", step_seconds=10.0, silence=300.0), 64, 300),
        (Tried("a", problem="does not fit"), 64, None),
    ],
)
def test_a_trial_that_would_be_silent_for_long_is_told(tried, batch_tokens, seconds):
    expected = seconds and (
        f"a: here a trial sends no heartbeat for about {seconds} s at a time and is ended as hung after 600 s: raise "
        "resources.stall_timeout, or lower fixed.batch_tokens or fixed.micro_batch_tokens"
    )
    assert dry_run.too_silent(study_of(SMALL), tried, batch_tokens) == expected


def test_the_warning_follows_its_arm(monkeypatch, tmp_path):
    monkeypatch.setattr(dry_run, "corpus_of", lambda study, output, base: (tmp_path, None))
    model = {"n_ctx": 16, "d_model": 8, "n_layer": 1, "n_head": 1}
    small = Trial(corpus="/corpus", model=model, lr=1e-3, tokens=64, batch_tokens=64, seed=1)
    monkeypatch.setattr(dry_run, "shortened", lambda study, *given: small)
    quick, slow = Tried("gelu", step_seconds=1.0, silence=1.0), Tried("mine", step_seconds=1.0, silence=1e3)
    monkeypatch.setattr(dry_run, "_try_arm", lambda spec, arm: slow if arm == "mine" else replace(quick, arm=arm))
    found = list(dry_run.try_arms(study_of(SMALL), tmp_path, tmp_path, 3))
    assert [each.arm if isinstance(each, Tried) else each.partition(" ")[0] for each in found] == [
        "gelu", "floor", "mine", "mine:",
    ]  # fmt: skip


def test_silence_is_measured_between_micro_batches(spec_of_try, monkeypatch):
    """On a fake clock, four micro-batches of 100 s each make a step of 400 s and a silence of 100 s."""
    now = [0.0]

    def slowly(*arguments):
        now[0] += 100.0
        return whole(*arguments)

    whole = causal.linear_nll
    monkeypatch.setattr(causal, "linear_nll", slowly)
    monkeypatch.setattr(child.time, "monotonic", lambda: now[0])
    assert child.try_out(spec_of_try)["silence"] == 100.0


@pytest.fixture
def spec_of_try(tmp_path):
    """Return a trial of two steps of four micro-batches."""
    from pagating.data import prepare

    (tmp_path / "train.txt").write_text("".join(f"{i} the quick brown fox jumps over a dog\n" for i in range(2000)))
    folder = prepare.prepare({"files": {"train": "train.txt"}}, {"vocab_size": 280}, 16, tmp_path / "cache", tmp_path)
    model = {"n_layer": 1, "d_model": 16, "n_head": 2, "n_ctx": 16}
    size = {"tokens": 128, "batch_tokens": 64, "micro_batch_tokens": 16, "eval_every": 1, "eval_windows": 1}
    return {"corpus": str(folder), "model": model, "lr": 1e-3, "seed": 1, **size}
