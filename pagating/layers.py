"""Statistics of each layer of a trained model on validation windows, for "What the activations do" of a report.

`layers.json` in the folder of a trained model has one object per layer, with the columns of `pagating.gating.probe`. It
is written when the model is, so it costs a forward and a backward pass of a few windows, after the trial's losses.
`samples.json` beside it has the rows of `pagating.tasks.samples`, as token ids: a machine that trains need not have the
tokenizer's library.
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
from pagating.tasks.samples import sample_rows
from pagating.tasks.table import task_of
from pagating.trial import Trial, require_trial

LAYERS, SAMPLES = "layers.json", "samples.json"
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


def write_measured(model: nn.Module, trial: Trial, folder: Path) -> str | None:
    """Write `layers.json` and `samples.json` into the folder of a trained model.

    A value that is not finite becomes null. A model that is not causal has no samples.

    Returns:
        None, or the reason in one line if one of them cannot be written.
    """
    files = ((LAYERS, layer_rows, "its layers are not measured"), (SAMPLES, sample_rows, "it has no samples"))
    for name, measure, otherwise in files:
        try:
            if rows := [_finite(row) for row in measure(model, trial)]:
                (folder / name).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            continue
        except OSError as error:
            reason = error.strerror or str(error)
        except (MemoryError, RuntimeError) as error:  # the trial is done, and its losses stand
            if (full := out_of_memory(error)) is None:
                raise
            reason = full
        return f"{folder}: is kept, but {otherwise}: {reason}"
    return None


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
