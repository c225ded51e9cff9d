"""Ray Tune drives the cells of a study.

One `Tuner.fit` runs all stages, so that actors are started once: its search algorithm hands out cells as the stages
allow, its scheduler asks the stages what to stop. What Ray knows is never needed again: the ledger is the source of
truth.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from tune.ledger import Cell
from tune.study import Study
from tune.study_run import StudyRun

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_THRESHOLD_S": "1000",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def _tune_parts(run: StudyRun) -> tuple[Any, Any, Any]:
    """Search algorithm, scheduler and callback of Ray Tune, all three views of one StudyRun."""
    from ray import tune as ray_tune
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler
    from ray.tune.search import Searcher

    cells: dict[str, Cell] = {}  # by Ray's trial id
    stopped: set[str] = set()

    class Cells(Searcher):
        """Hands out cells as the stages allow."""

        def __init__(self) -> None:
            super().__init__(metric="fraction", mode="max")

        def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
            cell = run.next_cell()
            if cell is None:
                return Searcher.FINISHED if run.stages.finished else None
            cells[trial_id] = cell
            return {"cell": cell.key, "trial": run.start(cell)}

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
            if run.stages.should_stop(cell, result["fraction"], result["row/val_nll"]):
                stopped.add(trial.trial_id)
                return TrialScheduler.STOP
            return TrialScheduler.CONTINUE

    class Records(ray_tune.Callback):
        """Records what trials report and how they end. A trial that was cut off is not recorded: it runs again."""

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            if result.get("row"):
                run.report(cells[trial.trial_id], result["row"])

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            cell, result = cells[trial.trial_id], trial.last_result or {}
            if trial.trial_id in stopped:
                row = run.records[cell.key].curve[-1]
                kept = {name: row[name] for name in ("val_nll", "train_nll", "tokens", "tokens_per_second")}
                run.end(cell, "stopped_early", {**kept, "steps": row["step"], "seconds": result["time_total_s"]})
            elif "outcome" in result:
                run.end(cell, result["outcome"], result["final"], result["reason"])

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            run.end(cells[trial.trial_id], *_failure(Path(trial.error_file).read_text(encoding="utf-8")))

    return Cells(), StopWithinArm(), Records()


def _failure(text: str) -> tuple[str, dict[str, Any], str]:
    """Outcome, empty final and reason from Ray's text of an error.

    An error raised by the trial comes with its traceback: infeasible. An actor or node that died does not: failed.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ("infeasible" if "Traceback" in text or 'File "' in text else "failed"), {}, lines[-1]


def _log_to(path: Path, library: str) -> None:
    """What a library wants to say goes to a log file of the study, not to the terminal."""
    logger = logging.getLogger(library)
    logger.handlers = [logging.FileHandler(path)]
    logger.propagate = False


def _slots(study: Study) -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1) // study.resources.cpus))


def run_ray(run: StudyRun, slots: int | None = None, trainable: Any = None) -> None:
    """Train every missing cell of a study with Ray Tune; returns when none is left or the run was interrupted.

    `slots`: trials side by side, as many as the cores hold when None. `trainable`: what trains a cell,
    `tune.trial.CellTrainable` when None (a simulated one measures everything else).
    """
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    import ray
    from ray import tune as ray_tune

    if trainable is None:
        from tune.trial import CellTrainable as trainable

    logs = run.folder / "logs"
    logs.mkdir(exist_ok=True)
    _log_to(logs / "ray.log", "ray")
    cpus = slots * run.study.resources.cpus if slots else None
    ours = not ray.is_initialized()
    if ours:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=True,
        )
    try:
        run.slots = slots or _slots(run.study)
        search, scheduler, ends = _tune_parts(run)
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
                storage_path=str(logs.resolve()),
                verbose=0,
                callbacks=[ends],
                log_to_file=False,
                checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        tuner.fit()
    finally:
        if ours:
            ray.shutdown()
