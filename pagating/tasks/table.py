"""The table of tasks: causal, masked and span."""

from __future__ import annotations

import importlib

from pagating.tasks.causal import CAUSAL
from pagating.tasks.task import Task
from pagating.trial import Trial


def task_of(trial: Trial) -> Task:
    """Return the task of a trial. transformers is imported only for tasks that need it."""
    if trial.task == "causal":
        return CAUSAL
    task: Task = importlib.import_module("pagating.tasks.denoising").TASKS[trial.task]
    return task
