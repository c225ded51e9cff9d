"""Every use of an API that Ray does not promise, with its reason. test_ray_private.py names the version.

Look here first when Ray is upgraded: the rest of the project uses documented names only.
"""

from __future__ import annotations

from typing import Any


def serve_prestarted() -> None:
    """Let the workers that Ray starts early be Tune's actors.

    Tune names variables of the environment for its actors, and a worker that was started without them is of no use to
    such an actor. They are in the driver's environment, and so in that of every process of a Ray of its own.
    """
    from ray.tune.execution import class_cache

    class_cache.DEFAULT_ENV_VARS.clear()
    class_cache.ENV_VARS_TO_PROPAGATE.clear()


def keep_idle_actors(controller: Any, trial: Any, more: int) -> None:
    """Let Tune keep `more` actors of a trial's kind while they have nothing to do.

    Tune keeps one, whatever comes next: the others would be started anew at the next stage, seconds each.
    """
    controller._actor_cache.increase_max(trial.placement_group_factory, by=more)


def waits_for_its_actor(controller: Any, trial: Any) -> bool:
    """Return whether an actor is being started for a trial."""
    return trial in controller._trial_to_actor


def actor_of(trial: Any) -> Any:
    """Return the actor that trains a trial, or None: a hung one has to be ended by its process."""
    return trial.temporary_state.ray_actor


def forget_results(trial: Any) -> None:
    """Drop the results of a trial that has ended: Ray keeps them to the end of the study, a third of its memory."""
    kept = trial.run_metadata
    kept.metric_analysis, kept.metric_n_steps, kept.last_result = {}, {}, {}


def stage_files_in(folder: str) -> None:
    """Tell Tune where a driver outside the cluster (ray://) keeps its files: else it asks a node of the cluster."""
    from ray.train._internal import storage

    storage._get_ray_train_session_dir = lambda: folder


def is_outside_the_cluster() -> bool:
    """Return whether this driver is connected by ray://."""
    import ray

    return bool(ray.util.client.ray.is_connected())


# The settings below are read by Ray's own processes when they start.
PRESTART = "RAY_prestart_worker_first_driver"  # start a worker for each core before any is asked for
LOADED = {  # what such a worker loads, while the driver still loads its own
    "RAY_preload_python_modules": "tune.backend.ray_trial,pagating.train,torch._dynamo",
    "RAY_idle_worker_killing_time_threshold_ms": "60000",  # Ray's own 1 s is over before they are asked for
}
REMOTE = {"_remote": False}  # argument of `ray.tune.run`: the ledger is here, also if the cluster is reached by ray://
