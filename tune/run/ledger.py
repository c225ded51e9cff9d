"""The ledger of cells: the source of truth of a study.

One JSON object a line, appended and on disk before anything depends on it: what the study is, each suggestion, start,
report and end of a cell, and each decision between stages. MLflow, Optuna and the tables are filled from it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import zlib
from pathlib import Path
from typing import Any

from tune.errors import LedgerError
from tune.study.cell import Cell, Record

SCHEMA = 1


def sealed(event: dict[str, Any]) -> bytes:
    """The event as a line, its last key the CRC-32 of what stands before it."""
    body = json.dumps(event, separators=(",", ":"), allow_nan=False)
    return f'{body[:-1]},"crc":"{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def opened(line: bytes) -> dict[str, Any] | None:
    """The event of a line; None where the line is cut off or damaged."""
    head, mark, tail = line.rpartition(b',"crc":"')
    if not mark or tail[8:] != b'"}' or f"{zlib.crc32(head + b'}'):08x}".encode() != tail[:8]:
        return None
    return json.loads(head + b"}")


class Ledger:
    """An append-only file of events, locked by the process that writes it (the lock ends with the process).

    Who holds the lock stands in `ledger.lock` beside it, for the message to the one who is refused; that file locks
    nothing by itself.
    """

    def __init__(self, path: Path, *, strict: bool = True) -> None:
        """Open or create `path` for writing; drop a cut-off last line. Raises LedgerError when another sweep has it.

        With `strict` a damaged line in the middle raises LedgerError too; without, the file is only locked.
        """
        self.path = path
        self._file = _locked(path)
        try:
            self.events, self._size = _read(path) if strict else ([], path.stat().st_size)
            os.ftruncate(self._file, self._size)
            holder = path.with_name("ledger.lock")
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        except (LedgerError, OSError):
            os.close(self._file)
            raise

    def append(self, event: str, *, sync: bool = True, **fields: Any) -> dict[str, Any]:
        """Add an event; with `sync` it is on disk when this returns.

        Raises LedgerError where the disk is full or the file was removed or moved; what it held before stands.
        """
        record = {"event": event, "time": round(time.time(), 3), **fields}
        line = sealed(record)
        try:
            if not self._in_place():
                raise LedgerError(
                    f"{self.path}: was removed or moved while the study ran; nothing more can be recorded"
                )
            self._write(line)
            if sync:
                os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._size)  # a half line in the middle would be damage
            raise LedgerError(
                f"{self.path}: cannot be written ({error.strerror}); what it held is kept, and the same command "
                "continues from there"
            ) from error
        self._size += len(line)
        self.events.append(record)
        return record

    def _in_place(self) -> bool:
        """Whether the open file is the one at the path: the folder may be removed or moved while the study runs."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _write(self, line: bytes) -> None:
        left = memoryview(line)
        while left:
            left = left[os.write(self._file, left) :]

    def close(self) -> None:
        """Release the file and its lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class MemoryLedger:
    """A ledger that lives in memory, for simulated studies: the same events, and nothing on disk."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def append(self, event: str, *, sync: bool = True, **fields: Any) -> dict[str, Any]:
        """Add an event; `sync` has no effect."""
        record = {"event": event, "time": round(time.time(), 3), **fields}
        self.events.append(record)
        return record

    def close(self) -> None:
        """Do nothing."""


def is_held(path: Path) -> bool:
    """Whether a process has the ledger locked now. It is asked by a shared lock, given back at once."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _locked(path: Path) -> int:
    """A descriptor of the ledger, open for appending and locked; raises LedgerError where another process has it."""
    patience = time.monotonic() + 0.2  # a look of `is_held` is over in far less
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            if time.monotonic() < patience:
                time.sleep(0.02)
                continue
            raise LedgerError(f"{path.parent}: another sweep is running this study: {holder(path)}") from error
        except OSError:
            os.close(descriptor)
            raise
        if os.fstat(descriptor).st_nlink > 0:
            return descriptor
        os.close(descriptor)  # a repair put another file in its place before it was locked


def holder(path: Path) -> str:
    """The process that has the ledger locked, or had it last, as it said itself."""
    try:
        return path.with_name("ledger.lock").read_text(encoding="utf-8").strip()
    except FileNotFoundError:  # the other one has only just begun
        return "it has not said yet which"


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Events of a ledger file and the length of its undamaged part, bytes."""
    raw = path.read_bytes()
    events, whole = [], 0
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, 1):
        if number == len(lines):  # what follows the last line end was never finished
            break
        event = opened(line)
        if event is None:
            if number == len(lines) - 1:
                break
            raise LedgerError(
                f"{path}: line {number} is damaged (its checksum does not match); `pagating repair {path.parent}` "
                "keeps the undamaged lines, and what the damaged ones held is trained again"
            )
        events.append(event)
        whole += len(line) + 1
    return events, whole


def read(path: Path) -> list[dict[str, Any]]:
    """Events of a ledger without locking it, for reports and `status`."""
    return _read(path)[0]


def cell_of(event: dict[str, Any]) -> Cell:
    """The cell that a `suggested` event describes."""
    return Cell(event["stage"], event["arm"], event["index"], event["seed"], event["config"], event["config_key"])


def records(events: list[dict[str, Any]]) -> dict[str, Record]:
    """The state of every cell, by key, in the order of suggestion. A cell that started again loses its old curve."""
    found: dict[str, Record] = {}
    for event in events:
        kind = event["event"]
        if kind == "suggested":
            cell = cell_of(event)
            found.setdefault(cell.key, Record(cell))
        elif kind == "started":
            record = found[event["cell"]]
            record.started, record.curve, record.times = event["time"], [], []
        elif kind == "report":
            found[event["cell"]].curve.append(event["row"])
            found[event["cell"]].times.append(event["time"])
        elif kind == "ended":
            record = found[event["cell"]]
            record.outcome, record.reason = event["outcome"], event.get("reason")
            record.final, record.ended = event["final"], event["time"]
    return found
