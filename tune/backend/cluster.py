"""A study on a Ray cluster that is there already: reaching it, what it holds, and what it is asked for.

The driver keeps the ledger, Optuna and MLflow; nodes train cells. Nodes may come and go: slots are counted anew while
the study runs, and a cell whose node is lost runs again on another.
"""

from __future__ import annotations

import math
import os
import platform
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tune.backend.ray_private import is_outside_the_cluster
from tune.errors import StudyError
from tune.study.addresses import ADDRESS, check_address
from tune.study.study import Study

ROOT = Path(__file__).parents[2]
WINGS = ("pagating", "tune", "analysis")
SAME = ("torch", "ray", "numpy", "tokenizers")  # versions that a trial's bits, or its reaching a node, depend on
ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # of workers: huge pages, where there are any
LOOK_SECONDS = 1.0
REACH_SECONDS = 15.0


@contextmanager
def connected(address: str, study: Study, warn: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """This process as the driver of a job on the cluster; the job ends with it, the cluster does not.

    `warn` is told, in a line, where it is reached without a token. Raises StudyError where nothing answers, or a node's
    Python or its packages are not the driver's.
    """
    import ray

    match = ADDRESS.fullmatch(check_address(address))
    if match and match["host"]:
        _reach(address, match["host"].strip("[]"), int(match["port"]))
    environment = {
        "py_modules": [str(ROOT / wing) for wing in WINGS],
        "excludes": ["**/__pycache__/**"],
        "env_vars": {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_DISABLE_TELEMETRY": "1", **ALLOCATOR},
    }
    try:
        ray.init(
            address=address,
            runtime_env=environment,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=True,
        )
    except (ConnectionError, RuntimeError, ValueError, ImportError, AssertionError) as error:
        hint = '; ray:// needs grpcio: pip install "ray[client]"' if match and match["client"] else ""
        raise StudyError(f"address '{address}': no study can run there: {_first_line(error)}{hint}") from error
    try:
        # for `auto` Ray sets it itself, where this user has a token
        if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
            warn(
                f"the cluster at '{address}' is reached without a token: whoever else reaches its ports can run any "
                "code on all of its nodes; start them with RAY_AUTH_MODE=token, and set it here (docs/cluster.md)"
            )
        check_nodes()
        yield
        ask_for(study, 0)
    finally:
        ray.shutdown()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _reach(address: str, host: str, port: int) -> None:
    """Ray itself waits a minute for a host that is not there."""
    try:
        socket.create_connection((host, port), REACH_SECONDS).close()
    except OSError as error:
        raise StudyError(f"address '{address}': nothing answers there: {error.strerror or error}") from error


def driver_node() -> str:
    """Ray's id of the node that the driver runs on; empty for a driver outside the cluster (ray://)."""
    import ray

    return "" if is_outside_the_cluster() else ray.get_runtime_context().get_node_id()


# --- nodes -----------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of Python and of the packages that must be the same on all nodes."""
    return {"python": platform.python_version(), **{name: version(name) for name in SAME}}


def check_nodes() -> None:
    """Raise StudyError for the first live node whose Python or packages are not the driver's."""
    import ray

    mine = versions()
    look = ray.remote(num_cpus=0)(versions)
    alive = [node for node in ray.nodes() if node["Alive"]]
    asked = [look.options(scheduling_strategy=_on(node["NodeID"])).remote() for node in alive]
    for node, answer in zip(alive, asked, strict=True):
        where = f"node {node['NodeManagerAddress']}"
        try:
            theirs = ray.get(answer, timeout=300)
        except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
            continue  # it went while it was asked
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]
            raise StudyError(
                f"{where} cannot run the study: {last}; every node needs the packages that it needs"
            ) from error
        if other := [f"{name} {theirs[name]}" for name in mine if theirs[name] != mine[name]]:
            here = ", ".join(f"{name} {mine[name]}" for name in mine)
            raise StudyError(f"{where} has {', '.join(other)}; a study needs the same everywhere, as here: {here}")


def _on(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def slots_of(nodes: list[dict[str, Any]], cpus: float, gpus: float) -> int:
    """Trials of `cpus` cores and `gpus` GPUs that live nodes hold side by side; a trial is on one node, and a share of
    a GPU on one GPU."""
    total = 0
    for node in nodes:
        has = node["Resources"] if node["Alive"] else {}
        fits = [has.get("CPU", 0.0) // cpus]
        if gpus >= 1:
            fits.append(has.get("GPU", 0.0) // gpus)
        elif gpus > 0:
            fits.append(has.get("GPU", 0.0) * math.floor(1 / gpus + 1e-9))
        total += int(min(fits))
    return total


class Capacity:
    """How many trials may run side by side now: the user's number, or the slots of the nodes that are alive."""

    def __init__(
        self,
        slots: int | None,
        cpus: float,
        gpus: float,
        nodes: Callable[[], list[dict[str, Any]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots, self._cpus, self._gpus, self._nodes, self._clock = slots, cpus, gpus, nodes, clock
        self._seen, self._looked = 0, -math.inf

    def __call__(self) -> int:
        if self._slots:
            return self._slots
        if self._clock() - self._looked >= LOOK_SECONDS:
            self._seen, self._looked = slots_of(self._nodes(), self._cpus, self._gpus), self._clock()
        return self._seen


def ask_for(study: Study, trials: int) -> None:
    """Tell the cluster's autoscaler, where it has one, to hold so many trials side by side; 0 takes the wish back."""
    from ray.autoscaler.sdk import request_resources

    if not is_outside_the_cluster():  # a driver outside cannot
        bundle: dict[str, float] = {"CPU": study.resources.cpus}
        if study.resources.gpus:
            bundle["GPU"] = study.resources.gpus
        request_resources(bundles=[bundle] * trials)


def kill_at(address: str, pid: int) -> None:
    """End a process on the node of that address, one that does not answer Ray."""
    import ray

    for node in ray.nodes():
        if node["Alive"] and node["NodeManagerAddress"] == address:
            ray.remote(num_cpus=0)(os.kill).options(scheduling_strategy=_on(node["NodeID"])).remote(pid, signal.SIGKILL)
