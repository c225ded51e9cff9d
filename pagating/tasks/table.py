"""The table of tasks: causal, masked and span."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

from pagating.tasks.causal import CAUSAL
from pagating.tasks.task import Task
from pagating.trial import Trial


def task_of(trial: Trial) -> Task:
    """Return the task of a trial. Raise ValueError if it needs transformers, which is not installed."""
    if trial.task == "causal":
        return CAUSAL
    if find_spec("transformers") is None:
        raise ValueError(f"task: {trial.task!r} needs transformers 5, which is not installed: pip install transformers")
    task: Task = importlib.import_module("pagating.tasks.denoising").TASKS[trial.task]
    return task
