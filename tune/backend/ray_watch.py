"""Watch Ray while a study runs: announce a wait, and end it if Ray's own processes end or answer no more."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from analysis.io.exits import Exit
from tune.backend.ray_private import ray_processes
from tune.errors import StudyStopped

ANNOUNCE_SECONDS = 20.0  # a wait that lasts this long is announced
LOOK_SECONDS = 1.0  # between two looks at Ray's processes
STOPPED_SECONDS = 20.0  # longest time in which a process of Ray may be stopped (SIGSTOP); Ray gives up after 60 s
SURE_SECONDS = 2.0  # between the loss of Ray and the reaction; a batch system may be ending this process too
TRY_SECONDS = 3.0  # between two connections to a cluster's server, and the longest wait for one
UNREACHED_SECONDS = 25.0  # longest time without a connection to a cluster's server
OWN_UNREACHED_SECONDS = 8.0  # the same for the server of this machine: it closes its port on SIGTERM, and may then hang
BLOCKED_SECONDS = 20.0  # after the loss of Ray, longest time in which the main thread has to stop


@contextmanager
def announced(say: Callable[[str], None], line: str, over: str) -> Iterator[None]:
    """Announce a wait if the block takes longer than `ANNOUNCE_SECONDS`, and its end.

    Args:
        say: Called with a line.
        line: What the wait is for.
        over: What the end of the wait means.
    """
    began = time.monotonic()
    said = threading.Event()

    def announce() -> None:
        said.set()
        say(line)

    timer = threading.Timer(ANNOUNCE_SECONDS, announce)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if said.is_set():
        say(f"{over}, after {time.monotonic() - began:.0f} s.")


class OwnRay:
    """Watch for processes of this process's own Ray that have ended, or that are stopped for long.

    Args:
        processes: Function that returns the name and the process of each part of Ray that no study runs without.
        clock: Function that returns a monotonic time in seconds.
    """

    def __init__(
        self,
        processes: Callable[[], list[tuple[str, Any]]] = ray_processes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._processes, self._clock = processes, clock
        self._stopped: dict[str, float] = {}  # since when a part is seen stopped

    def __call__(self) -> list[str]:
        """Return a text for each part that is lost."""
        lost, now = [], self._clock()
        for what, process in self._processes():
            if (code := process.poll()) is not None:
                lost.append(f"Ray's {what} ended (exit code {code})")
            elif not _is_stopped(process.pid):
                self._stopped.pop(what, None)
            elif now - self._stopped.setdefault(what, now) > STOPPED_SECONDS:
                lost.append(f"Ray's {what} is stopped")
        return lost


def _is_stopped(pid: int) -> bool:
    try:
        return str(psutil.Process(pid).status()) == psutil.STATUS_STOPPED
    except psutil.Error:
        return False  # it has just ended


class RayWatch:
    """Watcher of Ray in a thread of its own, because a call to a dead Ray blocks the thread that calls it.

    Without its scheduler (raylet) Ray starts no trial and says nothing. Without its server (GCS) it ends this process
    after a minute.

    Args:
        ended: Function that returns a text for each part of Ray that is lost.
        lost: Called with the reason once Ray is lost. It may end the process.
    """

    def __init__(self, ended: Callable[[], list[str]], lost: Callable[[str], None]) -> None:
        self._ended, self._lost = ended, lost
        self._is_lost = False
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray-watch", daemon=True)

    def __enter__(self) -> RayWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def look(self) -> bool:
        """Look at Ray; return True if it is lost."""
        with self._lock:
            if not self._is_lost and (ended := self._ended()):
                self._is_lost = True
                time.sleep(SURE_SECONDS)
                self._lost(" and ".join(ended))
            return self._is_lost

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            if self.look():
                if not self._over.wait(BLOCKED_SECONDS):
                    os._exit(Exit.COULD_NOT)  # the main thread is blocked in a call to the lost Ray
                return


class Reach:
    """Watch for a server of Ray that cannot be reached any more.

    Only the connection counts, which the kernel makes, also for a server that is busy or stopped.

    Args:
        name: Name of the server, for the message.
        address: HOST:PORT of the server.
        patience: Seconds without a connection after which it is lost.
        clock: Function that returns a monotonic time in seconds.
    """

    def __init__(self, name: str, address: str, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        host, _, port = address.rpartition(":")
        self._name, self._server, self._patience, self._clock = name, (host.strip("[]"), int(port)), patience, clock
        self._tried = self._reached = clock()

    def __call__(self) -> list[str]:
        """Return a text if the server is lost. Try once per `TRY_SECONDS`."""
        now = self._clock()
        if now - self._tried > TRY_SECONDS:
            self._tried = now
            with contextlib.suppress(OSError):
                socket.create_connection(self._server, TRY_SECONDS).close()
                self._reached = now
        unreached = now - self._reached
        return [f"{self._name} is not reached any more"] if unreached > self._patience else []


class Waiting:
    """Watch for a study whose cells wait while none runs.

    Args:
        patience: Longest wait in seconds.
        say: Called with a line if a wait lasts longer than `ANNOUNCE_SECONDS`, and at its end.
        clock: Function that returns a monotonic time in seconds.
    """

    def __init__(
        self,
        patience: float,
        say: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._patience, self._say, self._clock = patience, say, clock
        self._since, self._said = math.inf, False

    def look(self, waits: bool, slots: int) -> None:
        """Look whether cells wait while none runs, with a number of slots.

        Raises:
            StudyStopped: They have waited for too long.
        """
        now, minutes = self._clock(), f"{self._patience / 60:.0f} min"
        self._since = min(self._since, now)
        seconds = now - self._since
        if waits and seconds > self._patience:
            cause = "no worker has started" if slots else "no node can run a trial"
            raise StudyStopped(f"{cause} for {minutes}; the same command continues from here")
        if waits and seconds >= ANNOUNCE_SECONDS and not self._said:
            what = "a worker to start, which takes longer on a busy machine" if slots else "a node that can run one"
            self._say(f"The next trials wait for {what}. The study gives it up to {minutes}.")
            self._said = True
        if not waits:
            if self._said:
                self._say(f"Trials run, after {seconds:.0f} s.")
            self._since, self._said = math.inf, False
