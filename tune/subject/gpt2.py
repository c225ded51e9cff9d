"""Built-in subject: GPT-2, BERT or T5 with a gate in every MLP, trained by `pagating.train`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagating.trial import Trial
from tune.study.cell import Cell
from tune.study.inputs import Inputs, opened
from tune.study.study import Study
from tune.study.trial_spec import trial_spec
from tune.subject.subject import Step

if TYPE_CHECKING:
    from pagating.checkpoint import CheckpointFolder


class Gpt2:
    """Subject that trains the arms' models on the study's corpus."""

    def __init__(self, study: Study, inputs: Inputs) -> None:
        self.study, self.inputs = study, inputs

    @classmethod
    def at(cls, study: Study, folder: Path, corpus: Path) -> Gpt2:
        """Create the subject of a study whose folder and packed corpus exist."""
        return cls(study, opened(study, folder, corpus))

    def identity(self) -> dict[str, Any]:
        """Return the digests of the corpus, the user's gates and the pretrained weights."""
        return self.inputs.identity()

    def check_begun(self, begun: Mapping[str, Any]) -> None:
        """Raise StudyError if the study was started with another corpus or other gates."""
        self.inputs.check_begun(begun)

    def trial(self, cell: Cell) -> Trial:
        """Return the trial of a cell, with the paths of this machine."""
        test = self.study.tests(cell.stage)
        return self.inputs.place(
            trial_spec(self.study.at(cell.rung), cell.arm, cell.config, cell.seed, self.inputs.corpus, test=test)
        )

    @staticmethod
    def train(trial: Trial, checkpoints: CheckpointFolder | None, model: Path | None) -> Iterator[Step | None]:
        """Train a trial; see `pagating.train.heartbeats`."""
        from pagating.train import heartbeats  # loads torch, which the driver does without

        return heartbeats(trial, checkpoints, model)
