"""A small ladder of three sizes, and known losses of its cells."""

import math
from typing import Any

import numpy as np
import yaml

from tune.study.cell import Cell
from tune.study.study import Study

LADDER = """
name: tiny
question: Does it last?
model: {n_head: 2}
nuisance: {lr: {loguniform: [1.0e-3, 1.0e-1]}, weight_decay: {loguniform: [1.0e-2, 1.0]}}
search: {trials_per_arm: 3}
confirm: {seeds: 8}
scales:
  - {d_model: 16, n_layer: 1}
  - {d_model: 32, n_layer: 2, batch_tokens: 4096}
  - {d_model: 64, n_layer: 2, batch_tokens: 8192}
arms:
  gelu: {baseline: true}
  paglu: {gate: sigmoid, alpha: 0.5}
  bad: {unit: relu2}
  floor: {gate: sigmoid, alpha: 0.0, floor: true}
"""
LOSES = {"gelu": 0.0, "paglu": -0.02, "bad": 0.05, "floor": 0.2}  # nats above the baseline
BEST_LR = {1: 2e-2, 2: 1e-2, 3: 5e-3}  # by rung, the same for all arms


def ladder_of(**changes: Any) -> Study:
    """Return the ladder with other keys at its top level."""
    content = yaml.safe_load(LADDER)
    return Study.model_validate({**content, **changes})


def loss_of(cell: Cell, share: float = 1.0) -> float:
    """Return the loss of a cell: its rung's level, its seed's noise, its arm's difference, and a bowl."""
    shared, own = np.random.default_rng(cell.seed), np.random.default_rng([cell.seed, *cell.arm.encode()])
    bowl = 0.1 * math.log(cell.config["lr"] / BEST_LR[cell.rung]) ** 2
    bowl += 0.02 * math.log(cell.config["weight_decay"] / 0.13) ** 2
    noise = 0.01 * shared.normal() + 0.002 * own.normal()
    return 4.0 - 0.4 * cell.rung + LOSES[cell.arm] + bowl + noise
