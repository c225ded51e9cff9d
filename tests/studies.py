"""Study files of the tests, and functions that make variants of them."""

from pathlib import Path
from typing import Any

import yaml

from tune.study.files import parse
from tune.study.study import Study

# a user's file with activations: a function, and a module with a parameter for each feature
SNAKES = """
import torch
from torch import nn


def snake(x):
    return x + torch.sin(x) ** 2


class Snake(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.rate = nn.Parameter(torch.ones(features))

    def forward(self, x):
        return x + torch.sin(self.rate * x) ** 2 / self.rate
"""


def changed(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a study file with changes. A mapping changes the keys of its section, and None removes a key."""
    content = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict):
            content[key] = {name: kept for name, kept in {**content.get(key, {}), **value}.items() if kept is not None}
        elif value is None:
            content.pop(key, None)
        else:
            content[key] = value
    return content


def yaml_of(base: dict[str, Any], **changes: Any) -> str:
    """Return a study file, with changes, as YAML."""
    return str(yaml.safe_dump(changed(base, **changes), sort_keys=False))


def study_of(base: dict[str, Any], name: str = "x", **changes: Any) -> Study:
    """Return the study of a file, with changes, of the given name."""
    return parse(yaml_of(base, **changes), Path(f"{name}.yaml"))


# Every stage at its default size, for tests that plan or play a study
SMALL = yaml.safe_load("""
question: Is it better?
tokenizer: {vocab_size: 300}
model: {n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16}
fixed: {tokens: 6400, batch_tokens: 64, eval_windows: 8}
nuisance: {lr: {loguniform: [1.0e-4, 1.0e-2]}}
arms:
  gelu: {baseline: true}
  floor: {gate: sigmoid, alpha: 0.0, floor: true}
  mine: {gate: tanh, alpha: 0.5}
""")
# Few short trials, for tests that train
TINY = yaml.safe_load("""
question: Is it better?
tokenizer: {vocab_size: 300}
model: {n_layer: 1, d_model: 8, n_head: 2, n_ctx: 16}
fixed: {tokens: 1280, batch_tokens: 64, eval_windows: 4}
nuisance: {lr: {loguniform: [1.0e-3, 1.0e-2]}}
arms:
  gelu: {baseline: true}
  linear-floor: {gate: sigmoid, alpha: 0.0, floor: true}
search: {trials_per_arm: 2}
calibrate: {points: 3, seeds: 1, max_points: 3}
confirm: {seeds: 2}
""")
# As few trials of 40 steps and 10 evaluations, for tests that interrupt them
STEADY = changed(
    TINY,
    question="What survives?",
    model={"d_model": 16, "n_ctx": 32},
    fixed={"tokens": 20_480, "batch_tokens": 512, "eval_windows": None},
)
# Trials of 16 steps on the user's text train.txt, for tests of what travels to nodes
FROM_A_FILE = changed(
    STEADY,
    corpus={"files": {"train": "train.txt"}},
    tokenizer={"vocab_size": 280},
    model={"n_ctx": 16},
    fixed={"tokens": 1024, "batch_tokens": 64},
    arms={"linear-floor": None, "floor": {"gate": "sigmoid", "alpha": 0.0, "floor": True}},
)
# Two arms, for tests that tell a study's events by hand
TOLD = changed(
    SMALL,
    fixed={"tokens": 4096},
    arms={"mine": None},
    search={"trials_per_arm": 3},
    calibrate={"points": 3, "seeds": 2, "max_points": 5},
    confirm={"seeds": 3},
)


def with_arm(arm: str, **changes: Any) -> Study:
    """Return the small study, with changes, whose arms are the baseline and `mine`, given as YAML."""
    return study_of(SMALL, arms={"floor": None, "mine": yaml.safe_load(arm)}, **changes)
