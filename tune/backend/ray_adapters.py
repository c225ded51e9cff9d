"""Adapters between Ray Tune and one run: search algorithm, scheduler, callback and stopper.

Importing this module imports Ray, which takes seconds.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune as ray_tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tune.backend.ray_faults import Heartbeats, Processes, failure
from tune.backend.ray_private import actor_of, forget_results, keep_idle_actors, waits_for_its_actor
from tune.backend.ray_watch import Waiting
from tune.run.study_run import FATAL, StudyRun
from tune.study.cell import Cell


@dataclass
class Session:
    """State that the four adapters share.

    Attributes:
        run: The run.
        slots: Function that returns the current number of slots.
        waiting: Watch for cells that wait while none runs.
        request_slots: Called with each stage that starts, to request its slots from a cluster. None requests nothing.
        idle: Number of idle actors to keep, for example at the end of a stage.
        cells: Cells of the trials that have not ended, by Ray's trial id.
        live: Ray's trials that have not ended, by Ray's trial id.
        stopped: Ids of trials that were stopped early.
        hung: Ids of trials that were killed because their heartbeat stopped.
    """

    run: StudyRun
    slots: Callable[[], int]
    waiting: Waiting = field(default_factory=lambda: Waiting(math.inf))
    request_slots: Callable[[str], None] | None = None
    idle: int = 0
    cells: dict[str, Cell] = field(default_factory=dict)
    live: dict[str, Any] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)
    hung: set[str] = field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        """Return an empty state. Ray pickles its search algorithm but never uses the copy."""
        return {}

    def guarded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method so that any error ends the run with its reason. Ray would swallow it, and the study would hang.

        The traceback of an error that is not in `FATAL` goes to the study's log.
        """

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.run.fatal is None:
                try:
                    return method(*args, **kwargs)
                except FATAL as error:
                    self.run.give_up(error)
                except Exception as error:
                    logging.getLogger("ray").exception("a callback of the study raised")
                    self.run.give_up(error)
            return None

        return call


class Cells(Searcher):
    """Search algorithm that returns the cells of the stages."""

    def __init__(self, session: Session) -> None:
        super().__init__(metric="fraction", mode="max")
        self._session = session

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the config of the next trial, FINISHED if none will follow, or None if Ray has to ask again."""
        session = self._session
        run = session.run
        if run.stopping:
            return Searcher.FINISHED
        given = session.guarded(self._next)(trial_id)
        return Searcher.FINISHED if given is None and (run.stages.finished or run.stopping) else given

    def _next(self, trial_id: str) -> dict[str, Any] | None:
        if len(self._session.cells) >= self._session.slots():
            return None
        cell = self._session.run.next_cell()
        if cell is None:
            return None
        self._session.cells[trial_id] = cell
        return {"job": self._session.run.start(cell)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing. The callback records ended trials, because it also receives the trial's error."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing. A study continues from its ledger, never from Ray's state."""

    def restore(self, checkpoint_path: str) -> None:
        """Raise RuntimeError. A study continues from its ledger, never from Ray's state."""
        raise RuntimeError("a study continues from its ledger, never from Ray's state")


class StopWithinArm(FIFOScheduler):
    """Scheduler that stops a trial if the stages say so."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session, self._kept = session, 0

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Register a new trial; tell Ray at the first one how many idle actors to keep."""
        self._session.guarded(self._add)(tune_controller, trial)

    def _add(self, tune_controller: Any, trial: Any) -> None:
        self._session.live[trial.trial_id] = trial
        if self._kept < self._session.idle:
            keep_idle_actors(tune_controller, trial, self._session.idle - self._kept)
            self._kept = self._session.idle

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Return the trial that waits longest. Prefer a trial for which no actor is starting.

        Ray's own method scans all trials of the study at every event. It would also give a free actor a trial whose own
        actor is still starting, and then stop that actor. If a start takes longer than a trial, this never ends.
        """
        waiting = [trial for trial in tune_controller.get_live_trials() if trial.status == "PENDING"]
        free = (trial for trial in waiting if not waits_for_its_actor(tune_controller, trial))
        return next(free, next(iter(waiting), None))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop a trial if earlier trials of its arm were better."""
        return str(self._session.guarded(self._decide)(trial, result) or TrialScheduler.STOP)

    def _decide(self, trial: Any, result: dict[str, Any]) -> str:
        cell = self._session.cells[trial.trial_id]
        loss = result.get("row/val_nll")  # Ray flattens a result; a heartbeat has no loss
        if loss is not None and self._session.run.should_stop(cell, result["fraction"], loss):
            self._session.stopped.add(trial.trial_id)
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)


class WhenAsked(ray_tune.Stopper):
    """Stopper that ends Ray's experiment if the study is interrupted or cannot continue."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False, because no single trial is stopped here."""
        return False

    def stop_all(self) -> bool:
        """Return True if the run has to stop."""
        return self._session.run.stopping


class Records(ray_tune.Callback):
    """Callback that records evaluations and outcomes. It does not record an interrupted trial, which runs again."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._heartbeats, self._processes = Heartbeats(session.run.study.resources.stall_timeout), Processes()
        self._stage: str | None = None

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Write the run's heartbeat; kill the processes of trials whose own heartbeat stopped."""
        self._session.guarded(self._step)()

    def _step(self) -> None:
        session = self._session
        session.run.heartbeat(session.slots())
        runs = any(trial.status == "RUNNING" for trial in session.live.values())
        session.waiting.look(not runs and not session.run.stopping, session.slots())
        if session.request_slots and session.run.stages.stage != self._stage:
            self._stage = session.run.stages.stage
            session.request_slots(self._stage)
        for trial_id, trial in session.live.items():
            # a reused actor may hang before its next trial starts
            if trial_id not in self._heartbeats and actor_of(trial):
                self._heartbeats.beat(trial_id)
        for trial_id in self._heartbeats.silent():
            session.hung.add(trial_id)
            self._processes.kill(session.live[trial_id])

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Start to watch the heartbeat of a trial."""
        self._session.guarded(self._watch)(trial)

    def _watch(self, trial: Any) -> None:
        self._heartbeats.beat(trial.trial_id)
        self._processes.ask(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record an evaluation or a heartbeat."""
        self._session.guarded(self._take)(trial, result)

    def _take(self, trial: Any, result: dict[str, Any]) -> None:
        self._heartbeats.beat(trial.trial_id)
        cell = self._session.cells[trial.trial_id]
        self._session.run.cell_heartbeat(cell, result["fraction"], result.get("warning"))
        if result.get("row"):
            self._session.run.report(cell, result["row"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record the outcome of a trial."""
        if cell := self._session.cells.pop(trial.trial_id, None):
            self._session.guarded(self._end)(cell, trial)
        self._session.guarded(self._forget)(trial)

    def _end(self, cell: Cell, trial: Any) -> None:
        result = trial.last_result or {}
        if trial.trial_id in self._session.stopped:
            self._session.run.end_early(cell, result["time_total_s"])
        elif "outcome" in result:
            self._session.run.end(cell, result["outcome"], result["final"], result["reason"])

    def _forget(self, trial: Any) -> None:
        self._heartbeats.forget(trial.trial_id)
        self._session.live.pop(trial.trial_id, None)
        self._session.stopped.discard(trial.trial_id)
        forget_results(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial failed, unless the study is stopping."""
        self._session.guarded(self._forget)(trial)
        cell = self._session.cells.pop(trial.trial_id, None)
        if cell and not self._session.run.stopping:
            self._session.guarded(self._failed)(cell, trial)

    def _failed(self, cell: Cell, trial: Any) -> None:
        outcome, final, reason = failure(Path(trial.error_file).read_text(encoding="utf-8"))
        if trial.trial_id in self._session.hung:
            timeout = self._session.run.study.resources.stall_timeout
            reason = f"no heartbeat for {timeout:g} s (resources.stall_timeout)"
        self._session.run.end(cell, outcome, final, reason)
