"""Shared fixtures: a small packed corpus, short trials on it, and their checkpoints."""

from pathlib import Path

import pytest
import torch

from pagating.checkpoint import CheckpointFolder
from pagating.data import prepare
from pagating.train import Trial, steps

WORDS = "the quick brown fox jumps over the lazy dog and runs away from all of them\n"
MODEL = {"n_layer": 2, "d_model": 16, "n_head": 2, "n_ctx": 16, "dropout": 0.1}
TIMES = ("tokens_per_second", "seconds", "peak_rss_mb")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Pack 2,000 numbered lines, vocabulary 280, for windows of 16 tokens."""
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("text")
    (base / "train.txt").write_text("".join(f"{i * 7919 % 1000} {WORDS}" for i in range(2000)))
    return str(prepare.prepare({"files": {"train": "train.txt"}}, {"vocab_size": 280}, 16, base / "cache", base))


@pytest.fixture(scope="session")
def make_trial():
    """Return a trial of seven steps on a corpus, evaluated at the third, sixth and last, with given changes."""

    def make(packed, **changed):
        size = {"tokens": 64 * 7, "batch_tokens": 64, "eval_every": 3, "eval_windows": 8}
        return Trial(**{"corpus": packed, "model": MODEL, "lr": 3e-3, "seed": 5, **size, **changed})

    return make


@pytest.fixture(scope="session")
def plain():
    """Return the row without values that depend on time or memory."""

    def bare(row):
        return {k: bare(v) if isinstance(v, dict) else v for k, v in row.items() if k not in TIMES}

    return bare


@pytest.fixture(scope="session")
def interrupt():
    """Train up to `step` and save a checkpoint of it."""

    def stop(trial, folder, step):
        checkpoints = CheckpointFolder(folder, every_seconds=1e9)
        for made, _ in steps(trial, checkpoints):
            if made == step - 1:
                checkpoints.request()
            if made == step:
                assert any(f"-{step:010d}-" in path.name for path in Path(folder).iterdir())
                return
        raise AssertionError(f"the trial has no step {step}")

    return stop


@pytest.fixture(scope="session")
def save_step():
    """Save a small checkpoint of a step for the trial of zeros. Return its `CheckpointFolder`."""

    def save(folder, step, **options):
        checkpoints = CheckpointFolder(folder, **options)
        checkpoints.resume("0" * 16)
        assert checkpoints.save(step, {"a": torch.full((100,), float(step))}, {"step": step})
        return checkpoints

    return save


@pytest.fixture(scope="session")
def resume_folder():
    """Return the checkpoint that a trial continues from, and the notes about the folder."""

    def load(folder, identity="0" * 16):
        checkpoints = CheckpointFolder(folder)
        return checkpoints.resume(identity), checkpoints.notes

    return load
