"""Backend without Ray that trains cells of one shape together, as one batched model. It is meant for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from tune.backend.cells import Still, record, waiting
from tune.run.study_run import FATAL, StudyRun
from tune.study.cell import Cell


class Packed(Still):
    """Backend that packs all cells that may start now (`pagating.packed`) and trains pack after pack.

    A cell that fits into no pack trains alone. A result equals that of the cell alone up to the rounding of batched
    products. A search cell trains to its end, and no model is kept. A pack that is stopped leaves no result; the cells
    run again later.

    Args:
        most: Cells per pack at most.
        device: Device of all trials: cpu, cuda or auto. None means the one that the study names.
        stop: Called after each step; if it returns True, the run ends in good order.
        after: Called after each pack with the run.
    """

    def __init__(
        self,
        most: int,
        device: str | None = None,
        stop: Callable[[], bool] = lambda: False,
        after: Callable[[StudyRun], None] = lambda run: None,
    ) -> None:
        self.slots, self._device, self._stop, self._after = most, device, stop, after

    def train(self, run: StudyRun) -> None:
        """Train every missing cell.

        Raises:
            StudyStopped: The study cannot continue.
        """
        run.begin(slots=self.slots, sees_models=True)
        with run.interruption.orderly() if run.interruption else nullcontext():
            try:
                while cells := list(waiting(run)):
                    if not self._train(run, cells):
                        break
            except FATAL as error:
                run.give_up(error)
            except Exception as error:  # noqa: BLE001 (an error of our own code ends the study with its reason, as with Ray)
                run.give_up(error)
        run.raise_if_fatal()

    def _train(self, run: StudyRun, cells: list[Cell]) -> bool:
        """Train these cells, pack by pack; return False if the run has to stop before its end."""
        from pagating.packed.plan import on_device, packs, train_together  # torch takes seconds to load

        def stop() -> bool:
            run.heartbeat(self.slots)
            return run.stopping or self._stop()

        trials = [on_device(run.subject.trial(cell), self._device) for cell in cells]
        for places in packs(trials, self.slots):
            if stop():
                return False
            jobs = [run.start(cells[place]) for place in places]
            ends = train_together([trials[place] for place in places], stop, say=run.warn)
            if ends is None:
                return False
            for place, job, end in zip(places, jobs, ends, strict=True):
                record(run, cells[place], job, end)
            self._after(run)
        return True
