"""All uses of private APIs of Ray, each with its reason. test_ray_private.py states the tested version.

Check this module first after an upgrade of Ray. The rest of the project uses documented names only.
"""

from __future__ import annotations

import json
import os
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


def gpus_of_this_machine() -> int:
    """Return the number of GPUs that Ray would offer on this machine, without starting it."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    seen = manager.get_current_process_visible_accelerator_ids()
    found = int(manager.get_current_node_num_accelerators())
    return found if seen is None else min(found, len(seen))


WANTS_TOKEN = (
    "it wants a token, and this process has none or another: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
    "RAY_AUTH_TOKEN_PATH to the cluster's (docs/cluster.md)"
)
PING_SECONDS = 20.0


def refusal(address: str) -> str | None:
    """Return why no study can use the cluster at HOST:PORT, or at `auto`; None if nothing is known against it.

    Ray itself asks again for half a minute, with a line on standard error each time, and loses the answer.
    """
    import ray
    from ray import _raylet
    from ray._private import services

    place = services.canonicalize_bootstrap_address(address)
    if place is None:
        return None  # `ray.init` says that there is none
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        _raylet.GcsClient(address=place)  # type: ignore[attr-defined]
    except ray.exceptions.AuthenticationError:
        return WANTS_TOKEN
    except ray.exceptions.RayError as error:
        return f"no Ray cluster answers there: {str(error).splitlines()[0]}"
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
    return None


def client_refusal(place: str) -> str | None:
    """Return why no study can use the cluster behind ray://HOST:PORT; None if nothing is known against it.

    Ray itself asks three times, and then says only that its connection timed out.
    """
    try:
        import grpc
    except ImportError:
        return 'ray:// needs grpcio: pip install "ray[client]"'
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc

    request = ray_client_pb2.ClusterInfoRequest(type=ray_client_pb2.ClusterInfoType.PING)
    channel = init_grpc_channel(place)
    try:
        ray_client_pb2_grpc.RayletDriverStub(channel).ClusterInfo(request, timeout=PING_SECONDS)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return WANTS_TOKEN
        return f"no Ray client server answers there: {error.details() or error.code().name}"
    finally:
        channel.close()
    return None


def may_grow(gcs_address: str) -> bool:
    """Return True if the cluster has an autoscaler that can add nodes.

    Ray names the types of nodes that nobody can add after the nodes themselves.
    """
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.experimental.internal_kv import _internal_kv_get

    report = json.loads(_internal_kv_get("__autoscaling_status") or "{}").get("autoscaler_report", {})
    types = dict(report.get("node_type_mapping") or {})
    status = get_cluster_status(gcs_address)
    types |= {node.node_id: node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)} | types
    return any(kind and kind != f"node_{node}" for node, kind in types.items())


def ray_processes() -> list[tuple[str, Any]]:
    """Return the name and the process of each part of this process's own Ray that no study runs without."""
    from ray._private import worker

    node = worker._global_node
    found = dict(node.all_processes) if node else {}
    parts = (("gcs_server", "server (gcs_server)"), ("raylet", "scheduler (raylet)"))
    return [(what, one.process) for kind, what in parts for one in found.get(kind, [])]


def kill_processes() -> None:
    """Kill all processes of this process's own Ray, without waiting for any answer of theirs."""
    from ray._private import worker

    if node := worker._global_node:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


class _Leaving:
    """Stand-in for Ray's connection that ignores references which another thread frees while Ray shuts down.

    Ray would end this process at once, with exit code 1 and no word: its C++ code takes the call for one after the
    shutdown. The job's end frees all references anyway.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def remove_object_ref_reference(self, ref: Any) -> None:
        """Do nothing."""

    def remove_actor_handle_reference(self, actor_id: Any) -> None:
        """Do nothing."""


def shut_down() -> None:
    """Stop this process's Ray or leave the cluster. Other threads may free references meanwhile."""
    import ray
    from ray._private import worker

    if hasattr(worker.global_worker, "core_worker"):
        worker.global_worker.core_worker = _Leaving(worker.global_worker.core_worker)
    ray.shutdown()


def is_outside_the_cluster() -> bool:
    """Return True if this driver is connected by ray://."""
    import ray

    return bool(ray.util.client.ray.is_connected())


# Ray's own processes read the settings below when they start.
PRESTART = "RAY_prestart_worker_first_driver"  # start one worker per core before the first request
PRELOAD = "RAY_preload_python_modules"  # modules that a worker imports first
GUARDED = {PRELOAD: "pagating_study"}  # before a module of the user's hides one of our packages
LOADED = {  # modules that such a worker imports while the driver still imports its own
    PRELOAD: f"{GUARDED[PRELOAD]},tune.backend.ray_trial,pagating.train",
    "RAY_idle_worker_killing_time_threshold_ms": "60000",  # Ray's default of 1 s ends before the first request
}
REMOTE = {"_remote": False}  # run `ray.tune.run` in this process, which has the ledger, also with ray://
