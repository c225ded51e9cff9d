"""A study of the user's own training for tests: a function that needs no library, and ways to break the protocol."""

from pathlib import Path
from typing import Any

import yaml

from tests.studies import changed
from tune.study.files import load
from tune.study.own_study import OwnStudy

# The loss has its optimum at lr = 0.1. `shift` makes an arm better. Half the budget loses.
FUNCTION = """
import math
import random

import noise


def train(trial):
    draw = random.Random(f"{trial.seed}/{trial.shift}/{trial.budget}")
    off = math.log10(trial.lr / 0.1) ** 2
    for step in range(10, trial.budget + 1, 10):
        loss = 2 + off + 20 / step - trial.shift + noise.SIZE * draw.random()
        trial.report(step, val_loss=loss)
    return {"test_loss": loss + 0.01} if trial.test else {}
"""
NOISE = "SIZE = 0.02\n"
OWN: dict[str, Any] = yaml.safe_load("""
question: Is a shift better?
trial: mine.py:train
metric: {name: val_loss, test: test_loss}
budget: {steps: 40}
nuisance: {lr: {loguniform: [0.02, 0.5]}}
arms:
  plain: {baseline: true, set: {shift: 0.0}}
  shifted: {set: {shift: 0.1}}
  short: {of: plain, budget: 0.5, floor: true}
search: {trials_per_arm: 2}
calibrate: {points: 3, seeds: 1, max_points: 3}
confirm: {seeds: 4}
""")


def own_yaml(**changes: Any) -> str:
    """Return the study file with changes."""
    base = {key: value for key, value in OWN.items() if key != "trial" or "trial" not in changes}
    return str(yaml.safe_dump(changed(base, **changes), sort_keys=False))


def own_study(folder: Path, function: str = FUNCTION, **changes: Any) -> OwnStudy:
    """Write a study file and its function into a folder; return the study."""
    return _written(folder, function, own_yaml(**changes))


def named_study(folder: Path, function: str | None = None, **changes: Any) -> OwnStudy:
    """Write a study without a learning rate and its function into a folder; return the study."""
    return _written(folder, function or DEPTHS, yaml.safe_dump({**NAMED, **changes}, sort_keys=False))


def _written(folder: Path, function: str, text: str) -> OwnStudy:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(function, encoding="utf-8")
    (folder / "noise.py").write_text(NOISE, encoding="utf-8")
    (folder / "own.yaml").write_text(text, encoding="utf-8")
    study = load(folder / "own.yaml")
    assert isinstance(study, OwnStudy)
    return study


# Maximised accuracy, with its optimum at depth = 4 and rate = 0.1; a study without a learning rate.
DEPTHS = """
import math
import random


def train(trial):
    draw = random.Random(f"{trial.seed}/{trial.kind}/{trial.budget}")
    assert isinstance(trial.depth, int)
    off = 0.01 * (trial.depth - 4) ** 2 + 0.02 * math.log10(trial.rate / 0.1) ** 2
    gain = 0.02 if trial.kind == "new" else 0.0
    for epoch in range(5, trial.budget + 1, 5):
        accuracy = 0.9 - off - 1 / epoch + gain + 0.004 * draw.random()
        trial.report(epoch, accuracy=accuracy)
    return {"test_accuracy": accuracy - 0.01} if trial.test else {}
"""
NAMED: dict[str, Any] = yaml.safe_load("""
question: Is the new kind better?
trial: mine.py:train
metric: {name: accuracy, test: test_accuracy, goal: maximize}
budget: {epochs: 40}
nuisance: {depth: {choice: [1, 2, 3, 4, 6, 8]}, rate: {loguniform: [0.01, 1.0]}}
arms:
  plain: {baseline: true, set: {kind: old}}
  new: {set: {kind: new}}
  short: {of: plain, budget: 0.5, floor: true}
search: {trials_per_arm: 3}
calibrate: {seeds: 1}
confirm: {seeds: 5}
""")
