"""Prepare a folder for the examples of the docs: the project's files, a finished study, a small GPT-2 named GPT-2."""

import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from analysis.report import build
from tune.backend.inline import Inline
from tune.study.files import parse
from tune.sweep import sweep

ROOT = Path(__file__).parents[2]
STUDY = """
question: Does a parameterised gate lower GPT-2's loss?
tokenizer: {vocab_size: 300}
model: {n_layer: 1, d_model: 8, n_head: 2, n_ctx: 16}
fixed: {tokens: 1920, batch_tokens: 64, eval_windows: 4}
nuisance: {lr: {loguniform: [1.0e-3, 1.0e-2]}}
arms:
  gelu: {baseline: true}
  linear-floor: {gate: sigmoid, alpha: 0.0, floor: true}
  paglu-searched: {gate: sigmoid, alpha: {search: {uniform: [0.0, 2.0]}}}
  paglu-per-layer: {gate: sigmoid, alpha: {learnable: {init: 0.5, per: layer, range: free}}}
search: {trials_per_arm: 2}
calibrate: {points: 3, seeds: 1, max_points: 3}
confirm: {seeds: 3}
"""


def finish(text: str, name: str, output: Path) -> Path:
    """Run a study to its report in this process, without Ray."""
    study, folder = parse(text, Path(f"{name}.yaml")), output / name
    folder.mkdir(parents=True)
    sweep(study, folder, output, Inline())
    build.build(folder)
    return folder


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """Make a folder in which the docs' commands run as in a clone."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("clone")
    for name in ("configs", "docs", "benchmarks", "Makefile", "pyproject.toml"):
        os.symlink(ROOT / name, place / name)
    os.symlink(sys.prefix, place / ".venv")
    finish(STUDY, "sweep", place / "studies")
    size = GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=32, vocab_size=50)
    GPT2LMHeadModel(size).save_pretrained(place / "gpt2")
    return place
