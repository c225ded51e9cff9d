"""The driver's sign of life: a small file in the study's folder, for `pagating status` in another terminal."""

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
SECONDS = 5.0  # between two beats


@dataclass(frozen=True)
class Heartbeat:
    """What a driver said last: when (seconds since 1970), who it is, its slots, and the cells that run."""

    time: float
    driver: str
    slots: int
    running: tuple[str, ...]


class Heart:
    """Writes the heartbeats of this process, at most one in `SECONDS`."""

    def __init__(self, folder: Path) -> None:
        self._path, self._beaten = folder / NAME, -SECONDS
        self._driver = f"process {os.getpid()} on {socket.gethostname()}"

    def beat(self, slots: int, running: Iterable[str]) -> None:
        """Say that the driver lives, if it has not just been said."""
        if time.monotonic() - self._beaten < SECONDS:
            return
        self._beaten = time.monotonic()
        said = {"time": round(time.time(), 3), "driver": self._driver, "slots": slots, "running": sorted(running)}
        with contextlib.suppress(OSError):  # on a full disk it is the ledger that says so; no result needs a heartbeat
            write_whole(self._path, json.dumps(said), sync=False)

    def stop(self) -> None:
        """Take the last sign of life away: the driver ends in good order."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def read(folder: Path) -> Heartbeat | None:
    """The last heartbeat of a study's driver; None where there is none, or none that can be read."""
    try:
        said = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return Heartbeat(float(said["time"]), str(said["driver"]), int(said["slots"]), tuple(map(str, said["running"])))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
