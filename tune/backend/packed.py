"""Backend without Ray that trains cells of one shape together, as one batched model. It is meant for a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pagating.model.size import GPT2Size, stock_flops_per_token
from pagating.trial import Trial
from tune.backend.cells import Still, record, waiting
from tune.run.study_run import FATAL, StudyRun
from tune.study.cell import Cell
from tune.subject.subject import Job

if TYPE_CHECKING:
    from pagating.packed.plan import Ended

Trained = tuple["list[Ended] | None", list[str]]
HEARTBEAT_SECONDS = 0.5
SPARE = 0.9  # share of the time left that a pack may be expected to take


class Packed(Still):
    """Backend that packs all cells that may start now (`pagating.packed`) and trains pack after pack.

    A cell that fits into no pack trains alone. A result equals that of the cell alone up to the rounding of batched
    products. A search cell trains to its end, and no model is kept. A pack that is stopped leaves no result; its cells
    run again later.

    Args:
        most: Cells per pack at most.
        device: Device of all trials: cpu, cuda or auto. None means the one that the study names.
        left: Returns the seconds that are left. The run ends in good order when there are none. A pack that would take
            longer, by the speed of the pack before it, is made smaller.
        after: Called after each pack with the run and the cells of the pack.
        workers: Packs that train at the same time, each in a process of its own. A small pack spends its time on
            kernel launches, so that several share one GPU.
    """

    def __init__(
        self,
        most: int,
        device: str | None = None,
        left: Callable[[], float] = lambda: math.inf,
        after: Callable[[StudyRun, Sequence[Cell]], None] = lambda run, cells: None,
        workers: int = 1,
    ) -> None:
        self.slots, self._device, self._left, self._after = most, device, left, after
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._flops_per_second = math.inf

    def stop(self) -> None:
        """End the workers."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

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
        """Train these cells, pack by pack; return False if the run has to stop before the last one."""
        from pagating.packed.plan import on_device, packs, train_together  # torch takes seconds to load

        def stop() -> bool:
            run.heartbeat(self.slots)
            return run.stopping or self._left() <= 0

        trials = [on_device(run.subject.trial(cell), self._device) for cell in cells]
        parts = packs(trials, self.slots)
        if self._workers > 1 and len(parts) > 1:
            return self._train_beside(run, cells, trials, parts, stop)
        for places in parts:
            expected = _flops(trials[places[0]]) / self._flops_per_second
            fitting = int(min(len(places), SPARE * self._left() / expected if expected else math.inf))
            if fitting < 1 or stop():
                return False
            mine, began = places[:fitting], time.monotonic()
            jobs = [run.start(cells[place]) for place in mine]
            ends = train_together([trials[place] for place in mine], stop, say=run.warn)
            if ends is None:
                return False
            self._flops_per_second = sum(_flops(trials[place]) for place in mine) / (time.monotonic() - began)
            for place, job, end in zip(mine, jobs, ends, strict=True):
                record(run, cells[place], job, end)
            self._after(run, [cells[place] for place in mine])
            if fitting < len(places):
                return False
        return True

    def _train_beside(
        self,
        run: StudyRun,
        cells: Sequence[Cell],
        trials: Sequence[Trial],
        parts: Sequence[Sequence[int]],
        stop: Callable[[], bool],
    ) -> bool:
        """Train packs side by side in the workers; return False if the run has to stop before their end."""
        self._pool = self._pool or ProcessPoolExecutor(self._workers, get_context("spawn"))
        with TemporaryDirectory(prefix="pagating-packs-") as scratch:
            flag = Path(scratch) / "stop"
            begun: dict[Future[Trained], tuple[Sequence[int], list[Job]]] = {}
            for places in sorted(parts, key=len, reverse=True):  # the longest first
                jobs = [run.start(cells[place]) for place in places]
                begun[self._pool.submit(_work, [trials[place] for place in places], flag)] = places, jobs
            pending, whole = set(begun), True
            while pending:
                ended, pending = wait(pending, timeout=HEARTBEAT_SECONDS, return_when=FIRST_COMPLETED)
                for future in ended:
                    ends, notes = future.result()
                    for note in notes:
                        run.warn(note)
                    whole &= ends is not None
                    for place, job, end in zip(*begun[future], ends or (), strict=ends is not None):
                        record(run, cells[place], job, end)
                    if ends is not None:
                        self._after(run, [cells[place] for place in begun[future][0]])
                if pending and not flag.exists() and stop():
                    flag.touch()
        return whole


def _work(trials: list[Trial], flag: Path) -> Trained:
    """Train a pack in a worker until it ends or the file `flag` exists; return its ends, and lines for the user."""
    from pagating.packed.plan import train_together

    notes: list[str] = []
    return train_together(trials, flag.exists, say=notes.append), notes


def _flops(trial: Trial) -> float:
    """Return the training FLOPs of a trial, but for its output projection, for comparisons of packs."""
    return float(stock_flops_per_token(GPT2Size(1, **trial.model))) * trial.tokens
