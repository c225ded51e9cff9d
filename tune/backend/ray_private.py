"""All uses of private APIs of Ray, each with its reason. test_ray_private.py states the tested version.

Check this module first after an upgrade of Ray. The rest of the project uses documented names only.
"""

from __future__ import annotations

from typing import Any


def serve_prestarted() -> None:
    """Let Tune run its actors in the workers that Ray starts early.

    Tune requests environment variables for its actors. Ray never gives such an actor a worker that started without this
    request. The request is superfluous, because all processes of a local Ray inherit the driver's environment.
    """
    from ray.tune.execution import class_cache

    class_cache.DEFAULT_ENV_VARS.clear()
    class_cache.ENV_VARS_TO_PROPAGATE.clear()


def keep_idle_actors(controller: Any, trial: Any, more: int) -> None:
    """Let Tune keep `more` idle actors with the resources of this trial.

    Tune itself keeps only one. The others would have to start again at the next stage, which takes seconds each.
    """
    controller._actor_cache.increase_max(trial.placement_group_factory, by=more)


def waits_for_its_actor(controller: Any, trial: Any) -> bool:
    """Return True if an actor is being started for a trial."""
    return trial in controller._trial_to_actor


def actor_of(trial: Any) -> Any:
    """Return the actor that trains a trial, or None. It is needed to kill the process of a trial that hangs."""
    return trial.temporary_state.ray_actor


def forget_results(trial: Any) -> None:
    """Drop the results of a trial that has ended. Ray would keep them until the study ends."""
    kept = trial.run_metadata
    kept.metric_analysis, kept.metric_n_steps, kept.last_result = {}, {}, {}


def stage_files_in(folder: str) -> None:
    """Set the folder for the files of a driver outside the cluster (ray://). Tune would ask a node of the cluster."""
    from ray.train._internal import storage

    storage._get_ray_train_session_dir = lambda: folder


def is_outside_the_cluster() -> bool:
    """Return True if this driver is connected by ray://."""
    import ray

    return bool(ray.util.client.ray.is_connected())


# Ray's own processes read the settings below when they start.
PRESTART = "RAY_prestart_worker_first_driver"  # start one worker per core before the first request
PRELOAD = "RAY_preload_python_modules"  # modules that a worker imports first
GUARDED = {PRELOAD: "pagating_study"}  # before a module of the user's hides one of our packages
LOADED = {  # modules that such a worker imports while the driver still imports its own
    PRELOAD: f"{GUARDED[PRELOAD]},tune.backend.ray_trial,pagating.train,torch._dynamo",
    "RAY_idle_worker_killing_time_threshold_ms": "60000",  # Ray's default of 1 s ends before the first request
}
REMOTE = {"_remote": False}  # run `ray.tune.run` in this process, which has the ledger, also with ray://
