"""Failures of a trial with Ray: its process hangs or dies, its node is lost, or an error ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from tune.backend.cluster import kill_at
from tune.backend.ray_private import actor_of
from tune.errors import NODE_LOST, SHORT_OF_MEMORY

# Parts of Ray's text that mean a lost node. The last one means a broken connection whose cause Ray did not know yet; of
# a process that died it would know.
NODE_SIGNS = (
    "node has died",
    "node was terminated",
    "NodeDiedError",
    "node was preempted",
    "may or may not have been executed on the actor",
    "its owner has died",  # the driver's node, and all actors with it
)
MACHINE_ERRORS = (
    "ImportError",
    "ModuleNotFoundError",
    "SyntaxError",
    "OSError",
    "FileNotFoundError",
    "PermissionError",
)


class Heartbeats:
    """Times of the last heartbeat of each running trial.

    Time in which `silent` was not called does not count, beyond 5 s, because the driver itself was stopped then.

    Args:
        timeout: Seconds without a heartbeat after which a trial counts as hung.
        clock: Function that returns a monotonic time in seconds.
    """

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout, self._clock = timeout, clock
        self._last: dict[str, float] = {}
        self._checked = clock()

    def beat(self, trial_id: str) -> None:
        """Record a heartbeat of a trial."""
        self._last[trial_id] = self._clock()

    def __contains__(self, trial_id: str) -> bool:
        """Return True if the trial is watched."""
        return trial_id in self._last

    def forget(self, trial_id: str) -> None:
        """Stop watching a trial, because it has ended."""
        self._last.pop(trial_id, None)

    def silent(self) -> list[str]:
        """Return the trials without a heartbeat for longer than the timeout, each only once."""
        now = self._clock()
        absent, self._checked = max(0.0, now - self._checked - 5.0), now
        self._last = {trial_id: last + absent for trial_id, last in self._last.items()}
        late = [trial_id for trial_id, last in self._last.items() if now - last > self._timeout]
        for trial_id in late:
            self.forget(trial_id)
        return late


class Processes:
    """Hosts and process ids of the actors of trials. Each actor is asked once at its start, while it still answers."""

    def __init__(self) -> None:
        self._asked: dict[str, Any] = {}  # by actor, the reference to its answer

    def ask(self, trial: Any) -> None:
        """Ask the actor of a trial for its host and process id, unless it was asked before."""
        actor = actor_of(trial)
        if str(actor) not in self._asked:
            self._asked[str(actor)] = actor.get_current_ip_pid.remote()

    def kill(self, trial: Any) -> None:
        """Kill the process of a trial that hangs."""
        import ray

        actor = actor_of(trial)
        answer = self._asked.get(str(actor))
        if answer is not None and ray.wait([answer], timeout=0)[0]:
            with contextlib.suppress(ProcessLookupError, ray.exceptions.RayActorError):  # it has already died
                host, pid = ray.get(answer)
                if host == ray.util.get_node_ip_address():
                    os.kill(pid, signal.SIGKILL)  # a stopped process does not react to Ray
                else:
                    kill_at(host, pid)
        if actor is not None:
            ray.kill(actor)


def failure(text: str) -> tuple[str, dict[str, Any], str]:
    """Derive the outcome of a failed trial from Ray's text of its error.

    A text with a traceback means that the trial raised an error. The outcome is then infeasible, or failed for an error
    of the machine's files or packages (`MACHINE_ERRORS`). A text without a traceback means that the actor or its node
    died. The outcome is then failed.

    Returns:
        The outcome, an empty dict (no final result) and the reason.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if SHORT_OF_MEMORY in text:
        return "failed", {}, f"Ray killed its worker: the node was {SHORT_OF_MEMORY}"
    if "Traceback" in text or 'File "' in text:
        kind = lines[-1].partition(":")[0].rpartition(".")[2]
        return "failed" if kind in MACHINE_ERRORS else "infeasible", {}, lines[-1]
    if any(sign in text for sign in NODE_SIGNS):
        return "failed", {}, f"{NODE_LOST}: {lines[-1]}"
    _, found, detail = text.partition("Worker exit detail: ")
    return "failed", {}, f"its worker died: {detail.partition('. ')[0]}" if found else lines[-1]
