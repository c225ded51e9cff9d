"""Connection to a running Ray cluster: join it, check its nodes, count its slots and request more.

The driver has the ledger, Optuna and MLflow. The nodes train cells. Nodes may join and leave while the study runs, so
slots are counted again and again. A cell whose node is lost runs again on another node.
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

from tune.backend.ray_private import client_refusal, is_outside_the_cluster, may_grow, refusal, shut_down
from tune.backend.ray_watch import announced
from tune.errors import StudyError
from tune.study.addresses import ADDRESS, check_address
from tune.study.study import Study

ROOT = Path(__file__).parents[2]
WINGS = ("pagating", "tune", "analysis")
SAME = ("torch", "ray", "numpy", "tokenizers")  # another version may change a result or make a node unusable
ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # workers use huge pages if the machine has them
COUNT_SECONDS = 1.0  # shortest time between two counts of the slots
REACH_SECONDS = 15.0  # longest wait for the cluster's port
SETTINGS = b"\x04"  # type of an HTTP/2 frame, after three bytes of its length
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + SETTINGS + bytes(5)  # and a frame without settings
WAIT_SECONDS = 1800.0  # longest wait for a node that can run a trial


@contextmanager
def connected(
    address: str,
    study: Study,
    warn: Callable[[str], None] = lambda line: None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[None]:
    """Make this process the driver of a job on the cluster. At exit the job ends and the cluster stays.

    Args:
        address: Address of the cluster.
        study: The study.
        warn: Called with one line if the cluster is reached without a token.
        say: Called with a line if the cluster takes long to answer, and at its end.

    Raises:
        StudyError: Nothing answers at the address, or a node's Python or packages differ from the driver's.
    """
    line = f"The cluster at '{address}' has not answered yet. It is given a minute."
    with announced(say, line, "The cluster has answered"):
        _join(address)
    try:
        # for the address `auto`, Ray sets this variable itself if the user has a token
        if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
            warn(
                f"the cluster at '{address}' is reached without a token: anyone else who reaches its ports can run any "
                "code on all of its nodes; start them with RAY_AUTH_MODE=token, and set it here (docs/cluster.md)"
            )
        line = "The nodes of the cluster have not answered yet. They fetch the study's code first."
        with announced(say, line, "The nodes have answered"):
            check_nodes()
        check_capacity(address, study, warn)
        yield
        ask_for(study, 0)
    finally:
        shut_down()


def _join(address: str) -> None:
    """Make this process the driver of a job on the cluster."""
    import ray

    match = ADDRESS.fullmatch(check_address(address))
    if match and match["host"]:
        _reach(address, match["host"].strip("[]"), int(match["port"]))
    client = match and match["client"]
    if reason := client_refusal(address.removeprefix("ray://")) if client else refusal(address):
        raise StudyError(f"address '{address}': {reason}")
    environment = {
        "py_modules": [str(ROOT / name) for name in (*WINGS, "pagating_study.py")],
        "excludes": ["**/__pycache__/**"],
        "worker_process_setup_hook": "pagating_study.guard_worker",  # a name: a function cannot be sent by ray://
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
        raise StudyError(f"address '{address}': no study can run there: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text, or the name of its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _reach(address: str, host: str, port: int) -> None:
    """Raise StudyError if no gRPC server answers at the port within `REACH_SECONDS`. Ray would wait a minute.

    A server of gRPC, as Ray's are, answers the preface of HTTP/2 with its settings (RFC 9113, 3.4 and 4.1).
    """
    try:
        with socket.create_connection((host, port), REACH_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return  # it answers only to a client with a certificate
            connection.sendall(PREFACE)
            frame = connection.recv(4)
    except TimeoutError as error:
        raise StudyError(f"address '{address}': nothing answers there within {REACH_SECONDS:.0f} s") from error
    except OSError as error:
        raise StudyError(f"address '{address}': nothing answers there: {error.strerror or error}") from error
    if frame[3:] != SETTINGS:
        raise StudyError(f"address '{address}': what answers there is no Ray cluster")


def driver_node() -> str:
    """Return Ray's id of the driver's node. It is empty for a driver outside the cluster (ray://)."""
    import ray

    return "" if is_outside_the_cluster() else ray.get_runtime_context().get_node_id()


# --- nodes -----------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that must be the same on all nodes, by name."""
    return {"python": platform.python_version(), **{name: version(name) for name in SAME}}


def check_nodes() -> None:
    """Raise StudyError if the Python or the packages of a live node differ from the driver's."""
    import ray

    mine = versions()
    ask = ray.remote(num_cpus=0)(versions)
    alive = [node for node in ray.nodes() if node["Alive"]]
    asked = [ask.options(scheduling_strategy=_on(node["NodeID"])).remote() for node in alive]
    for node, answer in zip(alive, asked, strict=True):
        where = f"node {node['NodeManagerAddress']}"
        try:
            theirs = ray.get(answer, timeout=300)
        except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
            continue  # the node left during the check
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]
            raise StudyError(
                f"{where} cannot run the study: {last}; every node needs the packages of the study"
            ) from error
        if other := [f"{name} {theirs[name]}" for name in mine if theirs[name] != mine[name]]:
            here = ", ".join(f"{name} {mine[name]}" for name in mine)
            raise StudyError(f"{where} has {', '.join(other)}; a study needs the same everywhere, as here: {here}")


def _on(node_id: str) -> Any:
    """Return Ray's scheduling strategy that runs a task on one node only."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def slots_of(nodes: list[dict[str, Any]], cpus: float, gpus: float) -> int:
    """Count the trials that the live nodes can run in parallel.

    A trial runs on one node. A fraction of a GPU is on one GPU.

    Args:
        nodes: Nodes, as returned by `ray.nodes()`.
        cpus: Cores per trial.
        gpus: GPUs per trial, 0 or more, also a fraction.
    """
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


def check_capacity(address: str, study: Study, warn: Callable[[str], None]) -> None:
    """Check that a node of the cluster can run a trial, or that one may come.

    Args:
        address: Address of the cluster.
        study: The study.
        warn: Called with one line if the study has to wait for a node.

    Raises:
        StudyError: No node can run a trial, and the cluster has no autoscaler that could add one.
    """
    import ray

    cpus, gpus = study.resources.cpus, study.resources.gpus
    nodes = ray.nodes()
    if slots_of(nodes, cpus, gpus):
        return
    asked = f"{cpus} cores" + (f" and {gpus:g} GPUs" if gpus else "")
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    most = {name: max((node.get(name, 0.0) for node in alive), default=0.0) for name in ("CPU", "GPU")}
    waits = f"a trial asks for {asked}, and no node of the cluster at '{address}' has them yet; the study waits for"
    if not is_outside_the_cluster() and may_grow(ray.get_runtime_context().gcs_address):
        warn(f"{waits} one that the autoscaler adds, up to {WAIT_SECONDS / 60:.0f} min")
    elif not most["CPU"]:  # the head is there first, and its workers join
        warn(f"{waits} one that joins, up to {WAIT_SECONDS / 60:.0f} min")
    else:
        key = "gpus" if gpus > most["GPU"] else "cpus"
        held = f"{most['CPU']:g} cores and {most['GPU']:g} GPUs" if gpus else f"{most['CPU']:g} cores"
        raise StudyError(
            f"resources.{key}: a trial asks for {asked} of one node, and the largest of the cluster at '{address}' has "
            f"{held}: lower it, or start a larger node first"
        )


class Capacity:
    """Current number of slots: the user's number, or else the number that fits on the live nodes.

    Args:
        slots: The user's number. None counts the nodes' slots, at most once per `COUNT_SECONDS`.
        cpus: Cores per trial.
        gpus: GPUs per trial.
        nodes: Function that returns the nodes, such as `ray.nodes`.
        clock: Function that returns a time in seconds.
    """

    def __init__(
        self,
        slots: int | None,
        cpus: float,
        gpus: float,
        nodes: Callable[[], list[dict[str, Any]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots, self._cpus, self._gpus, self._nodes, self._clock = slots, cpus, gpus, nodes, clock
        self._counted, self._counted_at = 0, -math.inf

    def __call__(self) -> int:
        if self._slots:
            return self._slots
        if self._clock() - self._counted_at >= COUNT_SECONDS:
            self._counted, self._counted_at = slots_of(self._nodes(), self._cpus, self._gpus), self._clock()
        return self._counted


def ask_for(study: Study, trials: int) -> None:
    """Request slots for a number of trials from the cluster's autoscaler, if it has one. 0 withdraws the request."""
    from ray.autoscaler.sdk import request_resources

    if not is_outside_the_cluster():  # Ray allows the request only from inside
        bundle: dict[str, float] = {"CPU": study.resources.cpus}
        if study.resources.gpus:
            bundle["GPU"] = study.resources.gpus
        request_resources(bundles=[bundle] * trials)


def kill_at(address: str, pid: int) -> None:
    """Kill a process that does not answer Ray, on the node with that address."""
    import ray

    for node in ray.nodes():
        if node["Alive"] and node["NodeManagerAddress"] == address:
            ray.remote(num_cpus=0)(os.kill).options(scheduling_strategy=_on(node["NodeID"])).remote(pid, signal.SIGKILL)
