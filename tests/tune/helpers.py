"""What the tests of this wing share as functions."""

import json
from pathlib import Path
from typing import Any

from pagating.trial import Trial
from tune.run.study_run import StudyRun
from tune.study.study import Study
from tune.subject.gpt2 import Gpt2
from tune.subject.subject import Job


def run_of(study: Study, folder: Path, corpus: Path, **options: Any) -> StudyRun:
    """Return a run of the built-in subject in a study folder, on a packed corpus."""
    return StudyRun(study, folder, Gpt2.at(study, folder, corpus), **options)


def job_of(trial: Trial, cell: str = "a", checkpoints: Path | None = None, **options: Any) -> Job:
    """Return the job of a cell of the built-in subject."""
    folder = str(checkpoints) if checkpoints else None
    return Job(cell, trial, Gpt2.train, folder, trial.steps, **options)


def meta_of(corpus: Path) -> dict[str, Any]:
    """Return the content of a corpus's `corpus.json`, which need not be whole."""
    return dict(json.loads((corpus / "corpus.json").read_text(encoding="utf-8")))
