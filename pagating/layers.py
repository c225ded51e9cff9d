"""Statistics of each layer of a trained model on validation windows, for the section "Why" of a report.

`layers.json` in the folder of a trained model has one object per layer, with the columns of `pagating.gating.probe`. It
is written when the model is, so it costs a forward and a backward pass of a few windows, after the trial's losses.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pagating.device import out_of_memory
from pagating.gating.probe import Probe
from pagating.model.gpt2 import Stock
from pagating.tasks.table import task_of
from pagating.trial import Trial, require_trial

LAYERS = "layers.json"
POSITIONS = 2048  # tokens of the windows that are measured
RANKED = 512  # positions of which ranks are computed; a rank is at most that. GPT-2 small takes seconds at 1024


def layer_rows(model: nn.Module, trial: Trial) -> list[dict[str, Any]]:
    """Measure the layers of a trained model on the first validation windows of its trial; a value may be NaN.

    All arms of a study see the same windows. The model is evaluated in float32, without dropout. Its gradients are
    those of the mean loss; they are removed, and the model is left as it was.

    Raises:
        ValueError: The model has no MLP activation, or `trial` is not a trial.
    """
    require_trial(trial)
    task = task_of(trial)
    windows = max(1, POSITIONS // trial.model["n_ctx"])
    names = [name for name, module in model.named_modules() if isinstance(module, Stock)]
    was_training = model.training
    model.eval()
    with Probe(model, RANKED, names or None) as probe, torch.enable_grad():
        task.mean(model, task.held(trial, "validation"), windows).backward()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return [{"layer": layer, **row} for layer, row in enumerate(probe.rows())]


def write_layers(model: nn.Module, trial: Trial, folder: Path) -> str | None:
    """Write `layers.json` into the folder of a trained model. Return None, or the reason in one line if it cannot be.

    A value that is not finite becomes null.
    """
    try:
        rows = layer_rows(model, trial)
        (folder / LAYERS).write_text(json.dumps([_finite(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
    except (MemoryError, RuntimeError) as error:  # the trial is done, and its losses stand
        if (full := out_of_memory(error)) is None:
            raise
        reason = full
    else:
        return None
    return f"{folder}: the layers of the trained model are not measured: {reason}"


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
