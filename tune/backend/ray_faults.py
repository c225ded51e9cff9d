"""How a trial fails under Ray: its process falls silent, dies or is lost with its node, or an error ends it."""

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

NODE_SIGNS = (  # in Ray's text; the last: a connection broke before Ray knew why, and of a process it would know
    "node has died",
    "node was terminated",
    "NodeDiedError",
    "node was preempted",
    "may or may not have been executed on the actor",
)
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

    def __contains__(self, trial_id: str) -> bool:
        """Whether the trial is watched."""
        return trial_id in self._seen

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


class Processes:
    """Where the actors of trials run: each is asked once, when it starts, for one that hangs cannot be asked."""

    def __init__(self) -> None:
        self._asked: dict[str, Any] = {}  # by actor, the answer that is to come

    def ask(self, trial: Any) -> None:
        """Ask the actor of a trial, unless it was asked for an earlier one."""
        actor = actor_of(trial)
        if str(actor) not in self._asked:
            self._asked[str(actor)] = actor.get_current_ip_pid.remote()

    def kill(self, trial: Any) -> None:
        """End the process of a trial that does not answer."""
        import ray

        actor = actor_of(trial)
        answer = self._asked.get(str(actor))
        if answer is not None and ray.wait([answer], timeout=0)[0]:
            with contextlib.suppress(ProcessLookupError, ray.exceptions.RayActorError):  # it has died meanwhile
                host, pid = ray.get(answer)
                if host == ray.util.get_node_ip_address():
                    os.kill(pid, signal.SIGKILL)  # a stopped process does not hear Ray
                else:
                    kill_at(host, pid)
        if actor is not None:
            ray.kill(actor)


def failure(text: str) -> tuple[str, dict[str, Any], str]:
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
    if any(sign in text for sign in NODE_SIGNS):
        return "failed", {}, f"{NODE_LOST}: {lines[-1]}"
    _, found, detail = text.partition("Worker exit detail: ")
    return "failed", {}, f"its worker died: {detail.partition('. ')[0]}" if found else lines[-1]
