"""Heartbeat of the driver: a small file in the study's folder that `pagating status` reads in another terminal."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from analysis.io.write import write_whole

NAME = "heartbeat.json"
SECONDS = 5.0  # shortest time between two heartbeats


@dataclass(frozen=True)
class Heartbeat:
    """Last heartbeat of a driver.

    Attributes:
        time: Time of the heartbeat, seconds since 1970.
        driver: Process id and host of the driver.
        slots: Current number of slots.
        running: Keys of the running cells.
    """

    time: float
    driver: str
    slots: int
    running: tuple[str, ...]


class HeartbeatWriter:
    """Writer of this process's heartbeats, at most one per `SECONDS`."""

    def __init__(self, folder: Path) -> None:
        self._path, self._written = folder / NAME, -SECONDS
        self._driver = f"process {os.getpid()} on {socket.gethostname()}"

    def write(self, slots: int, running: Iterable[str]) -> None:
        """Write a heartbeat, unless the last one is younger than `SECONDS`."""
        if time.monotonic() - self._written < SECONDS:
            return
        self._written = time.monotonic()
        facts = {"time": round(time.time(), 3), "driver": self._driver, "slots": slots, "running": sorted(running)}
        with contextlib.suppress(OSError):  # the ledger reports a full disk; no result needs a heartbeat
            write_whole(self._path, json.dumps(facts), sync=False)

    def stop(self) -> None:
        """Remove the heartbeat, because the driver ends normally."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def read(folder: Path) -> Heartbeat | None:
    """Read the last heartbeat of a study's driver. Return None if there is none or if it is damaged."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
        running = tuple(map(str, found["running"]))
        return Heartbeat(float(found["time"]), str(found["driver"]), int(found["slots"]), running)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
