"""Shared fixture: a folder with the project's files, a finished study and a small GPT-2."""

import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from analysis.report import build
from tests.studies import TINY, changed, study_of
from tune.backend.inline import Inline
from tune.sweep import sweep

ROOT = Path(__file__).parents[2]
STUDY = changed(
    TINY,
    fixed={"tokens": 1920},
    arms={
        "paglu-searched": {"gate": "sigmoid", "alpha": {"search": {"uniform": [0.0, 2.0]}}},
        "paglu-per-layer": {"gate": "sigmoid", "alpha": {"learnable": {"init": 0.5, "per": "layer", "range": "free"}}},
    },
    confirm={"seeds": 3},
)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """Return a folder in which the commands of the docs run as in a clone."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("clone")
    for name in ("configs", "docs", "benchmarks", "Makefile", "pyproject.toml"):
        os.symlink(ROOT / name, place / name)
    os.symlink(sys.prefix, place / ".venv")
    folder = place / "studies" / "sweep"
    folder.mkdir(parents=True)
    sweep(study_of(STUDY, "sweep"), folder, folder.parent, Inline())
    build.build(folder)
    size = GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=32, vocab_size=50)
    GPT2LMHeadModel(size).save_pretrained(place / "gpt2")
    return place
