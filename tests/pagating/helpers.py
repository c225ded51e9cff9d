"""Shared functions: short trials, their rows and their checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pagating.checkpoint import CheckpointFolder
from pagating.train import Trial, steps

MODEL = {"n_layer": 2, "d_model": 16, "n_head": 2, "n_ctx": 16, "dropout": 0.1}
TIMES = ("tokens_per_second", "seconds", "peak_rss_mb")


def make_trial(packed: str, **changed: Any) -> Trial:
    """Return a trial of seven steps on a corpus, evaluated at the third, sixth and last, with given changes."""
    size = {"tokens": 64 * 7, "batch_tokens": 64, "eval_every": 3, "eval_windows": 8}
    return Trial(**{"corpus": packed, "model": MODEL, "lr": 3e-3, "seed": 5, **size, **changed})


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row without values that depend on time or memory."""
    return {k: plain(v) if isinstance(v, dict) else v for k, v in row.items() if k not in TIMES}


def interrupt(trial: Trial, folder: Path | str, step: int) -> None:
    """Train up to `step` and save a checkpoint of it."""
    checkpoints = CheckpointFolder(folder, every_seconds=1e9)
    for made, _ in steps(trial, checkpoints):
        if made == step - 1:
            checkpoints.request()
        if made == step:
            assert any(f"-{step:010d}-" in path.name for path in Path(folder).iterdir())
            return
    raise AssertionError(f"the trial has no step {step}")


def save_step(folder: Path, step: int, **options: Any) -> CheckpointFolder:
    """Save a small checkpoint of a step for the trial of zeros. Return its `CheckpointFolder`."""
    checkpoints = CheckpointFolder(folder, **options)
    checkpoints.resume("0" * 16)
    assert checkpoints.save(step, {"a": torch.full((100,), float(step))}, {"step": step})
    return checkpoints


def resume_folder(folder: Path, identity: str = "0" * 16) -> tuple[Any, list[str]]:
    """Return the checkpoint that a trial continues from, and the notes about the folder."""
    checkpoints = CheckpointFolder(folder)
    return checkpoints.resume(identity), checkpoints.notes
