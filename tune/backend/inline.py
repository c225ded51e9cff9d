"""Backend without Ray, for tests, notebooks and simulations. It trains one cell after the other in this process."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from tune.backend.ray_faults import failure
from tune.run.study_run import FATAL, StudyRun
from tune.study.cell import Cell
from tune.study.study import Study
from tune.subject.training import Training


class Inline:
    """Backend that trains cells one after the other, in the order of the stages.

    Its ledger equals that of Ray with one slot. A trial that hangs is not stopped, because it runs in this process.
    """

    slots = 1

    def check(self, study: Study) -> None:
        """Do nothing. A trial trains on whatever this machine has."""

    def start(self, study: Study, beside: Callable[[], None] = lambda: None) -> None:
        """Call `beside`. Nothing else has to start."""
        beside()

    def train(self, run: StudyRun) -> None:
        """Train every missing cell.

        Raises:
            StudyStopped: The study cannot continue.
        """
        run.begin(slots=1, sees_models=True)
        with run.interruption.orderly() if run.interruption else nullcontext():
            try:
                while not run.stopping and (cell := run.next_cell()) is not None:
                    _train(run, cell)
            except FATAL as error:
                run.give_up(error)
            except Exception as error:  # noqa: BLE001 (an error of our own code ends the study with its reason, as with Ray)
                run.give_up(error)
        run.raise_if_fatal()

    def stop(self) -> None:
        """Do nothing."""


def _train(run: StudyRun, cell: Cell) -> None:
    """Train one cell. If the run has to stop, the cell is not recorded and runs again later."""
    training, began = Training(run.start(cell)), time.monotonic()
    while training.outcome is None:
        run.heartbeat(slots=1)
        if run.stopping:
            training.cut_off()
            return
        result = _advance(training)
        run.cell_heartbeat(cell, result["fraction"], result.get("warning"))
        row = result["row"]
        if row:
            run.report(cell, row)
        if "outcome" in result:
            run.end(cell, result["outcome"], result["final"], result["reason"])
        elif row and run.should_stop(cell, result["fraction"], row["val_nll"]):
            run.end_early(cell, time.monotonic() - began)
        else:
            continue
        training.replaced()
        return


def _advance(training: Training) -> dict[str, Any]:
    """Advance a trial. Turn an error of its code into an outcome by the same rule as with Ray."""
    try:
        return training.advance()
    except Exception as error:  # noqa: BLE001 (a trial's code may raise any error, and only its cell fails)
        outcome, final, reason = failure("".join(traceback.format_exception(error)))
        return {"row": None, "fraction": 1.0, "outcome": outcome, "final": final, "reason": reason}
