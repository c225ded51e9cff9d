"""Best trained model of each arm, kept in `models/ARM/` of the study's folder and in MLflow at its run.

The best is the completed trial of the study's last stage with the lowest validation loss. It follows from the ledger
alone, so it does not depend on the order in which trials end, on an interruption or on a later look.
`pagating.load_model` loads one.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from analysis.io.write import write_whole
from tune.run.kept.cards import CARD, card
from tune.run.provenance import git_commit
from tune.study.cell import Cell, Record
from tune.study.study import Study

FACTS = "model.json"  # the same as in `pagating.saved_model`, whose libraries take seconds to load
LATER = "pagating trial {study} {cell} > trial.json; pagating train trial.json --model FOLDER"


def models_folder(study: Study, folder: Path) -> Path:
    """Return the folder of a study's models: in its storage, if it has one, else in its own folder."""
    return (Path(study.storage) / study.name if study.storage else folder) / "models"


def keeps_model(study: Study, cell: Cell) -> bool:
    """Return True if the trained model of a cell may be kept: of the last stage, on the highest rung."""
    return study.keep.models == "best" and study.tests(cell.stage) and cell.rung == len(study.scales)


def best_cells(study: Study, records: Iterable[Record]) -> dict[str, Record]:
    """Return each arm's completed cell of the last stage with the lowest `val_nll`. The lower seed wins a tie."""
    best: dict[str, Record] = {}
    for record in records:
        take_best(study, best, record)
    return best


def take_best(study: Study, best: dict[str, Record], record: Record) -> None:
    """Update the result of `best_cells` with one more record, in place."""
    arm = record.cell.arm
    if record.outcome == "completed" and keeps_model(study, record.cell):
        best[arm] = min(best.get(arm, record), record, key=_rank)


class BestModels:
    """Best trained model of each arm, updated when a cell ends.

    Attributes:
        visible: Trials write their models to a place that this process can read.
    """

    def __init__(self, study: Study, folder: Path | None, records: Iterable[Record]) -> None:
        self._study, self._folder = study, folder
        self._best = best_cells(study, records)
        self.visible = False

    def wanted(self, cell: Cell) -> bool:
        """Return True if a cell has to save its trained model in the folder of its checkpoints."""
        return self.visible and keeps_model(self._study, cell)

    def take(self, record: Record, trained: Path) -> str | None:
        """Keep a cell's trained model if it is the best of its arm so far; return a problem or None.

        Args:
            record: Record of the cell.
            trained: Folder of its trained model.
        """
        take_best(self._study, self._best, record)
        if self._folder and self._best.get(record.cell.arm) is record and read_facts(trained):
            try:
                place(models_folder(self._study, self._folder), record, trained)
                write_card(self._study, self._folder, record.cell.arm)
            except OSError as error:
                return f"{record.cell.key}: its trained model is not kept: {error}"
        return None

    def missing(self, records: Iterable[Record]) -> list[str]:
        """Return one line for each arm whose best model is not kept."""
        return missing_models(self._study, self._folder, records) if self.visible and self._folder else []


def _rank(record: Record) -> tuple[float, int, str]:
    return record.final["val_nll"], record.cell.seed, record.cell.key


def place(models: Path, record: Record, trained: Path) -> None:
    """Replace the model in `models/ARM/` by a cell's trained model.

    An interrupted call can be repeated, because `trained` is moved last, in one step.

    Args:
        models: Folder of the study's models.
        record: Record of the cell.
        trained: Folder of its trained model.

    Raises:
        OSError: A file cannot be written.
    """
    cell = record.cell
    facts = {**read_facts(trained), "arm": cell.arm, "cell": cell.key, "commit": _commit()}
    write_whole(trained / FACTS, json.dumps(facts, indent=1) + "\n")
    models.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(models / cell.arm, ignore_errors=True)
    os.replace(trained, models / cell.arm)


@functools.cache
def _commit() -> str | None:
    return git_commit()


def write_card(study: Study, folder: Path, arm: str) -> None:
    """Write the card of an arm's kept model, with the verdict if the study has one. Raise OSError if it cannot."""
    model = models_folder(study, folder) / arm
    if not (facts := read_facts(model)).get("cell"):
        return
    try:
        verdict = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        verdict = None
    write_whole(model / CARD, card(study, facts, verdict))


def read_facts(folder: Path) -> dict[str, Any]:
    """Read `model.json` of a folder. The result is empty if the file is missing or damaged."""
    try:
        found = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("final"), dict) else {}


def kept_models(models: Path, best: dict[str, Record]) -> dict[str, dict[str, Any]]:
    """Return the content of `model.json` by arm, for each arm whose kept model is that of its best cell."""
    found = {}
    for arm, record in best.items():
        facts = read_facts(models / arm)
        if facts.get("cell") == record.cell.key and facts["final"].get("val_nll") == record.final["val_nll"]:
            found[arm] = facts
    return found


def missing_models(study: Study, folder: Path, records: Iterable[Record]) -> list[str]:
    """Return one line for each arm whose best model is missing, with the commands that train the same bits again."""
    best = best_cells(study, records)
    there = kept_models(models_folder(study, folder), best)
    return [
        f"{arm}: the model of its best trial is not kept; "
        + LATER.format(study=study.name, cell=f"'{record.cell.key}'")
        for arm, record in best.items()
        if arm not in there
    ]
