"""Ray Tune drives the cells of a study.

One `Tuner.fit` runs all stages, so that actors are started once: its search algorithm hands out cells as the stages
allow, its scheduler asks the stages what to stop. What Ray knows is never needed again: the ledger is the source of
truth.
"""

from __future__ import annotations

import functools
import inspect
import logging
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tune.backend.cluster import Capacity, ask_for, driver_node
from tune.backend.ray_faults import Processes, Pulse, failure
from tune.errors import StudyStopped
from tune.run.interrupt import Interruption
from tune.run.study_run import FATAL, StudyRun
from tune.study.cell import Cell
from tune.study.sizes import side_by_side


def _guarded(run: StudyRun, method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, with what ends the study (a full disk, a removed folder) kept in `run.fatal`: Ray would eat it."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if run.fatal is None:
            try:
                return method(*args, **kwargs)
            except FATAL as error:
                run.fatal = error
        return None

    return call


def _tune_parts(
    run: StudyRun, room: Callable[[], int], wish: Callable[[str], None] | None = None, idle: int = 0
) -> tuple[Any, Any, Any, Any]:
    """Search algorithm, scheduler, callback and stopper of Ray Tune, all four views of one StudyRun.

    `room`: how many trials may be side by side now. `wish`: is told each stage that begins. `idle`: actors that are
    kept while they have nothing to do, as at the end of a stage.
    """
    from ray import tune as ray_tune
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler
    from ray.tune.search import Searcher

    cells: dict[str, Cell] = {}  # by Ray's trial id, of trials that have not ended
    stopped: set[str] = set()
    live: dict[str, Any] = {}  # Ray's trials that have not ended
    pulse, processes = Pulse(run.study.resources.stall_timeout), Processes()
    hung: set[str] = set()

    class Cells(Searcher):
        """Hands out cells as the stages allow."""

        def __init__(self) -> None:
            super().__init__(metric="fraction", mode="max")

        def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
            if run.stopping:
                return Searcher.FINISHED
            if len(cells) >= room():
                return None
            given = _guarded(run, self._next)(trial_id)
            return Searcher.FINISHED if given is None and (run.stages.finished or run.stopping) else given

        def _next(self, trial_id: str) -> dict[str, Any] | None:
            cell = run.next_cell()
            if cell is None:
                return None
            cells[trial_id] = cell
            own = {"checkpoints": str(run.checkpoints(cell)), "keep_checkpoints": run.study.keep.checkpoints}
            return {"cell": cell.key, "trial": run.start(cell), **own, "keep_model": run.keeps_model(cell)}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            """Ends are taken by the callback, which sees the trial's error too."""

        def save(self, checkpoint_path: str) -> None:
            """Nothing of Ray's is ever restored: the ledger is."""

        def restore(self, checkpoint_path: str) -> None:
            raise RuntimeError("a study is continued from its ledger, never from Ray's state")

    class StopWithinArm(FIFOScheduler):
        """Asks the stages whether a trial goes on."""

        kept = 0

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            """Tune keeps one idle actor, whatever comes next: the others would be started anew, seconds each."""
            live[trial.trial_id] = trial
            if self.kept < idle:
                tune_controller._actor_cache.increase_max(trial.placement_group_factory, by=idle - self.kept)
                self.kept = idle

        def choose_trial_to_run(self, tune_controller: Any) -> Any:
            """The trial that waits longest, of those for which no actor is being started, if there is one.

            Ray's own choice looks at all that ever ran, at every event; and an actor that ends a trial would take one
            whose own is being started, which is then ended: again and again, where a start is longer than a trial.
            """
            waiting = [trial for trial in tune_controller.get_live_trials() if trial.status == "PENDING"]
            starting = tune_controller._trial_to_actor
            return next((trial for trial in waiting if trial not in starting), next(iter(waiting), None))

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            cell = cells[trial.trial_id]  # the result comes flattened
            loss = result.get("row/val_nll")  # none in a sign of life
            if loss is not None and run.stages.should_stop(cell, result["fraction"], loss):
                stopped.add(trial.trial_id)
                return TrialScheduler.STOP
            return TrialScheduler.CONTINUE

    class WhenAsked(ray_tune.Stopper):
        """Ends the experiment when the study is interrupted or cannot go on."""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return run.stopping

    class Records(ray_tune.Callback):
        """Records what trials report and how they end. A trial that was cut off is not recorded: it runs again."""

        stage: str | None = None

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            run.pulse(room())
            if wish and run.stages.stage != self.stage:
                self.stage = run.stages.stage
                wish(self.stage)
            for trial_id, trial in live.items():
                # an actor that is used again may hang before its trial starts
                if trial_id not in pulse and trial.temporary_state.ray_actor:
                    pulse.beat(trial_id)
            for trial_id in pulse.silent():
                hung.add(trial_id)
                processes.kill(live[trial_id])

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            pulse.beat(trial.trial_id)
            processes.ask(trial)

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            pulse.beat(trial.trial_id)
            _guarded(run, self._take)(cells[trial.trial_id], result)

        def _take(self, cell: Cell, result: dict[str, Any]) -> None:
            run.alive(cell, result["fraction"], result.get("warning"))
            if result.get("row"):
                run.report(cell, result["row"])

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            if cell := cells.pop(trial.trial_id, None):
                _guarded(run, self._end)(cell, trial)
            self._forget(trial)

        def _end(self, cell: Cell, trial: Any) -> None:
            result = trial.last_result or {}
            if trial.trial_id in stopped:
                row = run.records[cell.key].curve[-1]
                kept = {name: row[name] for name in ("val_nll", "train_nll", "tokens", "tokens_per_second")}
                run.end(cell, "stopped_early", {**kept, "steps": row["step"], "seconds": result["time_total_s"]})
            elif "outcome" in result:
                run.end(cell, result["outcome"], result["final"], result["reason"])

        def _forget(self, trial: Any) -> None:
            """Ray keeps every trial to the end of the study: without its results and their averages, a third of it."""
            pulse.forget(trial.trial_id)
            live.pop(trial.trial_id, None)
            stopped.discard(trial.trial_id)
            kept = trial.run_metadata
            kept.metric_analysis, kept.metric_n_steps, kept.last_result = {}, {}, {}

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._forget(trial)
            cell = cells.pop(trial.trial_id, None)
            if cell and not run.stopping:  # a worker that dies while the study stops was cut off
                _guarded(run, self._failed)(cell, trial)

        def _failed(self, cell: Cell, trial: Any) -> None:
            outcome, final, reason = failure(Path(trial.error_file).read_text(encoding="utf-8"))
            if trial.trial_id in hung:
                reason = f"no sign of life for {run.study.resources.stall_timeout:g} s (resources.stall_timeout)"
            run.end(cell, outcome, final, reason)

    return Cells(), StopWithinArm(), Records(), WhenAsked()


def _log_to(path: Path, library: str) -> None:
    """What a library wants to say goes to a log file of the study, not to the terminal."""
    logger = logging.getLogger(library)
    logger.handlers = [logging.FileHandler(path)]
    logger.propagate = False


def run_ray(
    run: StudyRun,
    slots: int | None = None,
    trainable: Any = None,
    interruption: Interruption | None = None,
    address: str | None = None,
) -> None:
    """Train every missing cell of a study with the Ray that is started; returns when none is left, or interrupted.

    `slots`: trials side by side, as many as the cores hold when None. `trainable`: what trains a cell,
    `tune.backend.ray_trial.CellTrainable` when None (a simulated one measures everything else). `interruption`: who
    takes signals. `address`: of a Ray cluster that is there already, see `tune.backend.cluster`. Raises StudyStopped
    where the study cannot go on.
    """
    import ray
    from ray import tune as ray_tune
    from ray.tune.error import TuneError

    if trainable is None:
        from tune.backend.ray_trial import CellTrainable as trainable

        run.sees_models = not address or bool(run.study.storage)

    logs = run.folder / "logs"
    logs.mkdir(exist_ok=True)
    _log_to(logs / "ray.log", "ray")
    resources = run.study.resources
    with tempfile.TemporaryDirectory(prefix="pagating-ray-") as scratch:
        if address and not driver_node():
            _staged(scratch)
        room = Capacity(slots, resources.cpus, resources.gpus, ray.nodes)
        run.slots = room()
        search, scheduler, ends, stopper = _tune_parts(
            run,
            room,
            functools.partial(_wish, run, slots) if address else None,
            idle=0 if address else run.slots,  # nodes of a cluster may leave when they are idle
        )
        needs = {"cpu": resources.cpus, **({"gpu": resources.gpus} if resources.gpus else {})}
        with interruption.orderly() if interruption else nullcontext():
            run.interruption = interruption
            try:
                ray_tune.run(
                    _delivered(trainable, run) if address else trainable,
                    name="ray",
                    resources_per_trial=needs,
                    search_alg=search,
                    scheduler=scheduler,
                    num_samples=-1,
                    reuse_actors=True,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                    storage_path=scratch,  # of Ray's own state nothing is ever read
                    verbose=0,
                    callbacks=[ends],
                    stop=stopper,
                    log_to_file=False,
                    checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),
                    raise_on_failed_trial=False,
                    _remote=False,  # the ledger is here, also where the cluster is reached by ray://
                )
            except TuneError as error:
                if run.fatal is None:
                    raise StudyStopped(
                        f"Ray Tune gave up: {str(error).strip().splitlines()[-1]}; see {logs}"
                    ) from error
    if (fatal := run.fatal) is not None:
        said = f"{fatal.filename}: {fatal.strerror}" if isinstance(fatal, OSError) and fatal.filename else str(fatal)
        raise StudyStopped(f"the study stopped: {said}") from fatal


def _staged(folder: str) -> None:
    """Tell Ray Tune where a driver outside the cluster (ray://) stages its files: else its node is asked."""
    from ray.train._internal import storage

    storage._get_ray_train_session_dir = lambda: folder  # no public setting has this folder


def _wish(run: StudyRun, slots: int | None, stage: str) -> None:
    """Ask the cluster for as many slots as the stage can use."""
    most = side_by_side(run.study, stage)
    ask_for(run.study, min(slots, most) if slots else most)


def _delivered(trainable: Any, run: StudyRun) -> Any:
    """The trainable with what its nodes lack, where it takes it: a simulated one needs nothing."""
    from ray import tune as ray_tune

    from tune.backend.delivery import pack

    if "parcel" not in inspect.signature(trainable.setup).parameters:
        return trainable
    storage = Path(run.study.storage) if run.study.storage else None
    return ray_tune.with_parameters(trainable, parcel=pack(run.corpus, run.folder, storage, driver_node()))
