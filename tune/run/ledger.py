"""Ledger of cells, the source of truth of a study.

The ledger has one JSON object per line: the study's identity, each suggestion, start, report and end of a cell, and
each decision between stages. An event is on disk before anything depends on it. MLflow, Optuna and the tables are
filled from the ledger.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import time
import zlib
from pathlib import Path
from typing import Any

from tune.errors import LedgerError, LedgerWriteError
from tune.study.cell import Cell, Record

SCHEMA = 1


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: null for a number that is not finite, text for an unknown object."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if callable(item := getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        return plain(item())  # a number of numpy or torch
    return str(value)


def encode_event(event: dict[str, Any]) -> bytes:
    """Encode an event as a line. Its last key is the CRC-32 of the text before that key."""
    body = json.dumps(event, separators=(",", ":"), allow_nan=False)
    return f'{body[:-1]},"crc":"{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def decode_event(line: bytes) -> dict[str, Any] | None:
    """Decode the event of a line. Return None if the line is incomplete or damaged."""
    head, mark, tail = line.rpartition(b',"crc":"')
    if not mark or tail[8:] != b'"}' or f"{zlib.crc32(head + b'}'):08x}".encode() != tail[:8]:
        return None
    return json.loads(head + b"}")


class Ledger:
    """Append-only file of events, locked by the process that writes it. The lock ends with the process.

    The file `ledger.lock` next to it names that process for the error message of a second one. It locks nothing itself.

    Args:
        path: File to open or create. An incomplete last line is removed.
        strict: Read the events. False only locks the file.

    Raises:
        LedgerError: Another sweep has the ledger, or, with `strict`, a line in the middle is damaged.
    """

    def __init__(self, path: Path, *, strict: bool = True) -> None:
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
        """Append an event; return it with its time.

        Args:
            event: Kind of the event.
            sync: Wait until the event is on disk.
            fields: The other keys of the event.

        Raises:
            LedgerWriteError: The disk is full, or the file was removed or moved. The earlier events are kept.
        """
        record = {"event": event, "time": round(time.time(), 3), **plain(fields)}
        line = encode_event(record)
        try:
            if not self._in_place():
                raise LedgerWriteError(
                    f"{self.path}: was removed or moved while the study ran; nothing more can be recorded"
                )
            self._write(line)
            if sync:
                os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._size)  # the next event would turn an incomplete line into a damaged one
            raise LedgerWriteError(
                f"{self.path}: cannot be written ({error.strerror}); the events in it are kept, and the same command "
                "continues from there"
            ) from error
        self._size += len(line)
        self.events.append(record)
        return record

    def _in_place(self) -> bool:
        """Return True if the open file is still the one at the path, that is, was not removed or moved."""
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
    """Ledger in memory, for simulated studies. It has the same events as a `Ledger` and writes nothing to disk."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def append(self, event: str, *, sync: bool = True, **fields: Any) -> dict[str, Any]:
        """Append an event; return it with its time. `sync` has no effect."""
        record = {"event": event, "time": round(time.time(), 3), **plain(fields)}
        self.events.append(record)
        return record

    def close(self) -> None:
        """Do nothing."""


def is_held(path: Path) -> bool:
    """Return True if a process has the ledger locked. The test takes a shared lock and releases it at once."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _locked(path: Path) -> int:
    """Open the ledger for appending and lock it; return its descriptor.

    Raises:
        LedgerError: Another process has it locked.
    """
    patience = time.monotonic() + 0.2  # the shared lock of `is_held` is released much earlier
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
        os.close(descriptor)  # a repair replaced the file before it was locked


def holder(path: Path) -> str:
    """Return a text that names the process that has the ledger locked, or had it last."""
    try:
        return path.with_name("ledger.lock").read_text(encoding="utf-8").strip()
    except FileNotFoundError:  # the other process has only just locked the ledger
        return "process not yet known"


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the events of a ledger file and the length of its complete lines in bytes.

    Raises:
        LedgerError: A line other than the last one is damaged.
    """
    raw = path.read_bytes()
    events, whole = [], 0
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, 1):
        if number == len(lines):  # the text after the last line end is incomplete
            break
        event = decode_event(line)
        if event is None:
            if number == len(lines) - 1:
                break
            raise LedgerError(
                f"{path}: line {number} is damaged (its checksum does not match); `pagating repair {path.parent}` "
                "keeps the undamaged lines, and the cells of the damaged lines are trained again"
            )
        events.append(event)
        whole += len(line) + 1
    return events, whole


def read(path: Path) -> list[dict[str, Any]]:
    """Read the events of a ledger without locking it, for reports and `status`."""
    return _read(path)[0]


def first(path: Path, kind: str) -> dict[str, Any] | None:
    """Return the first undamaged event of a kind, without its checksum, or None if there is none."""
    with path.open("rb") as lines:
        events = (decode_event(line.rstrip(b"\n")) for line in lines)
        return next((event for event in events if event and event["event"] == kind), None)


def cell_of(event: dict[str, Any]) -> Cell:
    """Return the cell of a `suggested` event."""
    return Cell(
        event["stage"],
        event["arm"],
        event["index"],
        event["seed"],
        event["config"],
        event["config_key"],
        event.get("axis", ""),
        event.get("rung", 0),
    )


def of_rung(events: list[dict[str, Any]], rung: int) -> list[dict[str, Any]]:
    """Return the events of one rung of a ladder, and those that belong to no rung; all events if `rung` is 0."""
    if not rung:
        return events
    rungs = {event["cell"]: event["rung"] for event in events if event["event"] == "suggested"}
    return [event for event in events if event.get("rung", rungs.get(event.get("cell", ""), rung)) == rung]


def records(events: list[dict[str, Any]]) -> dict[str, Record]:
    """Return the record of every cell by key, in the order of suggestion. A new start of a cell clears its curve."""
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
