"""The best trained model of each arm: in `models/ARM/` of the study's folder, and in MLflow with the run it comes from.

The best is the completed trial of the study's last stage with the lowest validation loss. The ledger says which that
is, so that the order in which trials end, an interruption or a second look changes nothing. `pagating.load_model` loads
one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from analysis.io.write import write_whole
from tune.study.cell import Cell, Record
from tune.study.study import Study

FACTS = "model.json"  # as `pagating.saved_model`, whose libraries take seconds to load, has it
LATER = "pagating trial {study} {cell} > trial.json; python -m pagating.train trial.json --model FOLDER"


def models_folder(study: Study, folder: Path) -> Path:
    """Where a study keeps its models: in its own folder; with a storage there, where other machines leave them."""
    return (Path(study.storage) / study.name if study.storage else folder) / "models"


def keeps_model(study: Study, cell: Cell) -> bool:
    """Whether the trained model of a cell may be kept."""
    return study.keep.models == "best" and study.tests(cell.stage)


def best_cells(study: Study, records: Iterable[Record]) -> dict[str, Record]:
    """By arm, the completed cell of the last stage with the lowest `val_nll`, the lower seed where two are equal."""
    best: dict[str, Record] = {}
    for record in records:
        take_best(study, best, record)
    return best


def take_best(study: Study, best: dict[str, Record], record: Record) -> None:
    """Take one more record into what `best_cells` found, in place."""
    arm = record.cell.arm
    if record.outcome == "completed" and keeps_model(study, record.cell):
        best[arm] = min(best.get(arm, record), record, key=_rank)


class BestModels:
    """The best trained model of each arm, kept up to date while cells end.

    Attributes:
        visible: Whether trials leave their models where this process can read them.
    """

    def __init__(self, study: Study, folder: Path | None, records: Iterable[Record]) -> None:
        self._study, self._folder = study, folder
        self._best = best_cells(study, records)  # by arm, of all cells that have ended
        self.visible = False

    def wanted(self, cell: Cell) -> bool:
        """Return whether a cell is to leave its trained model in the folder of its checkpoints."""
        return self.visible and keeps_model(self._study, cell)

    def take(self, record: Record, trained: Path) -> str | None:
        """Keep the model that a cell left in `trained` if it is its arm's best so far; return a problem or None."""
        take_best(self._study, self._best, record)
        if self._folder and self._best.get(record.cell.arm) is record and read_facts(trained):
            try:
                place(models_folder(self._study, self._folder), record, trained)
            except OSError as error:
                return f"{record.cell.key}: its trained model is not kept: {error}"
        return None

    def missing(self, records: Iterable[Record]) -> list[str]:
        """Return a line for each arm whose best model could not be kept."""
        return missing_models(self._study, self._folder, records) if self.visible and self._folder else []


def _rank(record: Record) -> tuple[float, int, str]:
    return record.final["val_nll"], record.cell.seed, record.cell.key


def place(models: Path, record: Record, trained: Path) -> None:
    """Put the model that a cell left in `trained` into `models/ARM/`, for the one there. Raises OSError.

    Cut off at any point, it can be done again: `trained` goes last, in one step.
    """
    cell = record.cell
    facts = {**read_facts(trained), "arm": cell.arm, "cell": cell.key}
    write_whole(trained / FACTS, json.dumps(facts, indent=1) + "\n")
    models.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(models / cell.arm, ignore_errors=True)
    os.replace(trained, models / cell.arm)


def read_facts(folder: Path) -> dict[str, Any]:
    """What `model.json` of a folder says; empty where there is none or it is damaged."""
    try:
        found = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("final"), dict) else {}


def kept_models(models: Path, best: dict[str, Record]) -> dict[str, dict[str, Any]]:
    """By arm, what `model.json` says of those of the `best` cells whose model is there."""
    found = {}
    for arm, record in best.items():
        facts = read_facts(models / arm)
        if facts.get("cell") == record.cell.key and facts["final"].get("val_nll") == record.final["val_nll"]:
            found[arm] = facts
    return found


def missing_models(study: Study, folder: Path, records: Iterable[Record]) -> list[str]:
    """A line for each arm whose best model is not there, with the commands that train it again, to the same bits."""
    best = best_cells(study, records)
    there = kept_models(models_folder(study, folder), best)
    return [
        f"{arm}: the model of its best trial is not kept; "
        + LATER.format(study=study.name, cell=f"'{record.cell.key}'")
        for arm, record in best.items()
        if arm not in there
    ]
