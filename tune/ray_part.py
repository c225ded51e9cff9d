"""Ray Tune drives the cells of a study.

One `Tuner.fit` runs all stages, so that actors are started once: its search algorithm hands out cells as the stages
allow, its scheduler asks the stages what to stop. What Ray knows is never needed again: the ledger is the source of
truth.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tune.interrupt import Interruption
from tune.ledger import Cell
from tune.study import Study
from tune.study_run import FATAL, SHORT_OF_MEMORY, StudyRun, StudyStopped

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for: listen on loopback only; 1 opens it to other machines
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_THRESHOLD_S": "1000",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "6",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


MACHINE_ERRORS = (
    "ImportError",
    "ModuleNotFoundError",
    "SyntaxError",
    "OSError",
    "FileNotFoundError",
    "PermissionError",
)


class Pulse:
    """When each running trial last said that it is alive; `silent` gives those that have not for `timeout` seconds.

    Time is monotonic, and time in which nobody looked (a driver that was stopped itself) is not counted.
    """

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout, self._clock = timeout, clock
        self._seen: dict[str, float] = {}
        self._looked = clock()

    def beat(self, trial_id: str) -> None:
        """The trial is alive."""
        self._seen[trial_id] = self._clock()

    def forget(self, trial_id: str) -> None:
        """The trial has ended."""
        self._seen.pop(trial_id, None)

    def silent(self) -> list[str]:
        """Trials to be given up; each is told once."""
        now = self._clock()
        absent, self._looked = max(0.0, now - self._looked - 5.0), now
        self._seen = {trial_id: seen + absent for trial_id, seen in self._seen.items()}
        late = [trial_id for trial_id, seen in self._seen.items() if now - seen > self._timeout]
        for trial_id in late:
            self.forget(trial_id)
        return late


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


def _tune_parts(run: StudyRun) -> tuple[Any, Any, Any, Any]:
    """Search algorithm, scheduler, callback and stopper of Ray Tune, all four views of one StudyRun."""
    from ray import tune as ray_tune
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler
    from ray.tune.search import Searcher

    cells: dict[str, Cell] = {}  # by Ray's trial id
    stopped: set[str] = set()
    pulse = Pulse(run.study.resources.stall_timeout)
    hung: set[str] = set()

    class Cells(Searcher):
        """Hands out cells as the stages allow."""

        def __init__(self) -> None:
            super().__init__(metric="fraction", mode="max")

        def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
            if run.stopping:
                return Searcher.FINISHED
            given = _guarded(run, self._next)(trial_id)
            return Searcher.FINISHED if given is None and (run.stages.finished or run.stopping) else given

        def _next(self, trial_id: str) -> dict[str, Any] | None:
            cell = run.next_cell()
            if cell is None:
                return None
            cells[trial_id] = cell
            return {"cell": cell.key, "trial": run.start(cell), "checkpoints": str(run.checkpoints(cell))}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            """Ends are taken by the callback, which sees the trial's error too."""

        def save(self, checkpoint_path: str) -> None:
            """Nothing of Ray's is ever restored: the ledger is."""

        def restore(self, checkpoint_path: str) -> None:
            raise RuntimeError("a study is continued from its ledger, never from Ray's state")

    class StopWithinArm(FIFOScheduler):
        """Asks the stages whether a trial goes on."""

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

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            late = pulse.silent()
            for trial in trials if late else []:
                if trial.trial_id in late:
                    hung.add(trial.trial_id)
                    _kill(trial)

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            pulse.beat(trial.trial_id)

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
            pulse.forget(trial.trial_id)
            _guarded(run, self._end)(cells[trial.trial_id], trial)

        def _end(self, cell: Cell, trial: Any) -> None:
            result = trial.last_result or {}
            if trial.trial_id in stopped:
                row = run.records[cell.key].curve[-1]
                kept = {name: row[name] for name in ("val_nll", "train_nll", "tokens", "tokens_per_second")}
                run.end(cell, "stopped_early", {**kept, "steps": row["step"], "seconds": result["time_total_s"]})
            elif "outcome" in result:
                run.end(cell, result["outcome"], result["final"], result["reason"])

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            pulse.forget(trial.trial_id)
            if not run.stopping:  # a worker that dies while the study stops was cut off
                _guarded(run, self._failed)(cells[trial.trial_id], trial)

        def _failed(self, cell: Cell, trial: Any) -> None:
            outcome, final, reason = _failure(Path(trial.error_file).read_text(encoding="utf-8"))
            if trial.trial_id in hung:
                reason = f"no sign of life for {run.study.resources.stall_timeout:g} s (resources.stall_timeout)"
            run.end(cell, outcome, final, reason)

    return Cells(), StopWithinArm(), Records(), WhenAsked()


def _kill(trial: Any) -> None:
    """End the process of a trial that does not answer."""
    import ray

    place = trial.temporary_state.location  # known once the trial has reported
    if place.pid and place.hostname == ray.util.get_node_ip_address():
        os.kill(place.pid, signal.SIGKILL)  # a stopped process does not hear Ray
    ray.kill(trial.temporary_state.ray_actor)


def _failure(text: str) -> tuple[str, dict[str, Any], str]:
    """Outcome, empty final and reason from Ray's text of an error.

    An error that the trial raised comes with its traceback: infeasible, unless it speaks of the machine's files. An
    actor or node that died comes without: failed.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if SHORT_OF_MEMORY in text:
        return "failed", {}, f"its worker was ended by Ray: the node was {SHORT_OF_MEMORY}"
    if "Traceback" in text or 'File "' in text:
        kind = lines[-1].partition(":")[0].rpartition(".")[2]
        return "failed" if kind in MACHINE_ERRORS else "infeasible", {}, lines[-1]
    _, found, detail = text.partition("Worker exit detail: ")
    return "failed", {}, f"its worker died: {detail.partition('. ')[0]}" if found else lines[-1]


def _log_to(path: Path, library: str) -> None:
    """What a library wants to say goes to a log file of the study, not to the terminal."""
    logger = logging.getLogger(library)
    logger.handlers = [logging.FileHandler(path)]
    logger.propagate = False


def _slots(study: Study) -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1) // study.resources.cpus))


def _private_token() -> None:
    """Give Ray a token of this process where it cannot keep its own under HOME: it would not start."""
    if "RAY_AUTH_MODE" in os.environ or "RAY_AUTH_TOKEN" in os.environ:
        return
    try:
        kept = Path.home() / ".ray"
        kept.mkdir(exist_ok=True)
        writable = os.access(kept, os.W_OK)
    except (RuntimeError, OSError):  # a user without a home, or with one that is not there or not writable
        writable = False
    if not writable:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def _ray(slots: int | None, study: Study) -> Iterator[None]:
    """A Ray on this machine, unless one is there already; ended with all its processes."""
    import ray

    if ray.is_initialized():
        yield
        return
    _private_token()
    try:
        ray.init(
            address="local",
            num_cpus=slots * study.resources.cpus if slots else None,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=True,
        )
        yield
    finally:
        ray.shutdown()


def run_ray(
    run: StudyRun, slots: int | None = None, trainable: Any = None, interruption: Interruption | None = None
) -> None:
    """Train every missing cell of a study with Ray Tune; returns when none is left or the run was interrupted.

    `slots`: trials side by side, as many as the cores hold when None. `trainable`: what trains a cell,
    `tune.trial.CellTrainable` when None (a simulated one measures everything else). `interruption`: who takes signals.
    Raises StudyStopped where the study cannot go on.
    """
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    from ray import tune as ray_tune
    from ray.tune.error import TuneError

    if trainable is None:
        from tune.trial import CellTrainable as trainable

    logs = run.folder / "logs"
    logs.mkdir(exist_ok=True)
    _log_to(logs / "ray.log", "ray")
    with _ray(slots, run.study), tempfile.TemporaryDirectory(prefix="pagating-ray-") as scratch:
        run.slots = slots or _slots(run.study)
        search, scheduler, ends, stopper = _tune_parts(run)
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(trainable, {"cpu": run.study.resources.cpus}),
            tune_config=ray_tune.TuneConfig(
                search_alg=search,
                scheduler=scheduler,
                num_samples=-1,
                reuse_actors=True,
                max_concurrent_trials=run.slots,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=ray_tune.RunConfig(
                name="ray",
                storage_path=scratch,  # of Ray's own state nothing is ever read
                verbose=0,
                callbacks=[ends],
                stop=stopper,
                log_to_file=False,
                checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        with interruption.orderly() if interruption else nullcontext():
            run.interruption = interruption
            try:
                tuner.fit()
            except TuneError as error:
                if run.fatal is None:
                    raise StudyStopped(
                        f"Ray Tune gave up: {str(error).strip().splitlines()[-1]}; see {logs}"
                    ) from error
    if (fatal := run.fatal) is not None:
        said = f"{fatal.filename}: {fatal.strerror}" if isinstance(fatal, OSError) and fatal.filename else str(fatal)
        raise StudyStopped(f"the study stopped: {said}") from fatal
