"""Tracker that fills MLflow in the background. A slow or dead tracking server costs the trials nothing.

The same sweep, the next one or `pagating sync` writes what the server missed.
"""

from __future__ import annotations

import hashlib
import json
import math
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.io.text import one_line, redact
from analysis.io.write import write_whole
from tune.errors import TrackingError
from tune.run import ledger as ledgers
from tune.run.standing import concluded_after
from tune.study.cell import Record
from tune.study.study import Study
from tune.tracking.models import log_models
from tune.tracking.runs import Runs
from tune.tracking.store import count_runs, sqlite_file
from tune.tracking.verdict import log_verdict

HOLD_BACK = 30.0  # longest time in seconds that the import of MLflow waits for the first trial
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between attempts at a store that answers with errors
LAST_TRIES = 3  # attempts at a store that answers with errors, once the study waits for it


class MlflowTracker:
    """Tracker that writes cells to MLflow from its own thread, so that `started`, `reported` and `ended` never wait.

    Args:
        uri: MLflow tracking URI.
        study: The study.
        folder: The study's folder.
        meta: Content of `corpus.json` of the packed corpus, for the corpus's digest and sizes.
    """

    def __init__(self, uri: str, study: Study, folder: Path, meta: Mapping[str, Any]) -> None:
        tokens = {split: counts["tokens"] for split, counts in meta["splits"].items()}
        self.runs = Runs(uri, study, folder, meta["digest"], tokens)
        self._queue: queue.Queue[Record | None] = queue.Queue()
        self._dirty: dict[str, Record] = {}
        self._connected = False
        self._finished = True
        self.problem: str | None = None
        self._trained = threading.Event()  # set at the first report or end of a trial, or at `close`
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    @property
    def parent_id(self) -> str | None:
        """Id of the study's parent run. It is None until MLflow has answered."""
        return self.runs.parent_id

    # --- called by the study, none of them waits ---

    def started(self, record: Record) -> None:
        """Show that a cell starts or restarts, as a run that is RUNNING."""
        self._queue.put(_snapshot(record))

    def reported(self, record: Record, row: dict[str, Any]) -> None:
        """Show a new evaluation of a cell."""
        self._queue.put(_snapshot(record))
        self._trained.set()

    def ended(self, record: Record) -> None:
        """Show the outcome of a cell."""
        self._queue.put(_snapshot(record))
        self._trained.set()

    @property
    def owed(self) -> int:
        """Number of cells whose state in the ledger is not in MLflow yet."""
        with self._queue.mutex:
            waiting = [record for record in self._queue.queue if record is not None and not self.runs.has(record)]
        return len({*list(self._dirty), *(record.cell.key for record in waiting)})

    def close(
        self,
        records: Iterable[Record] = (),
        *,
        finished: bool = True,
        patience: float = 60.0,
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Write everything that is not written yet. Then `owed` is the number of cells that could not be written.

        Args:
            records: All cells of the study, including those of earlier sweeps.
            finished: The study is finished. Then wait for a slow store as long as it makes progress.
            patience: Seconds to wait for one cell if the study is finished, else for all cells.
            warn: Called with one line if this method waits for the store.
        """
        self._finished = finished
        for record in records:
            if record.outcome is not None:
                self._queue.put(_snapshot(record))
        self._queue.put(None)
        self._trained.set()
        left = math.inf
        while self._thread.is_alive() and self.owed < left:
            if left < math.inf:
                warn(f"waiting for MLflow, which lacks {self.owed} cells; Ctrl-C leaves them to `pagating sync`")
            left = self.owed if finished else 0
            self._thread.join(patience)
        if self.owed and self._thread.is_alive():
            self.problem = self.problem or f"not written within {patience:g} s"

    def finish(self, verdict: dict[str, Any]) -> str | None:
        """Write the verdict and the models of a finished study if MLflow has all cells.

        Returns:
            A line on what MLflow still lacks, or None.
        """
        runs, where = self.runs, redact(self.runs.uri)
        owed, problem, lacking = self.owed, self.problem, "the verdict"
        if not owed and runs.parent_id:
            try:
                log_verdict(runs.uri, runs.study, runs.parent_id, runs.folder, verdict)
                lacking = "the trained models"
                _log_models(runs.uri, runs.study, runs.parent_id, runs.folder)
            except Runs.errors() as error:
                problem = _message(error)
            else:
                mark(runs.folder, runs.uri, runs.parent_id)
                return None
        return (
            f"MLflow at {where} still lacks {f'{owed} cells and ' if owed else ''}{lacking}"
            f"{f' ({problem})' if problem else ''}; the ledger has all of it: run `pagating sync {runs.folder}` when "
            "MLflow is back, or the same sweep again"
        )

    # --- the thread ---

    def _work(self) -> None:
        self._trained.wait(HOLD_BACK)  # importing MLflow takes processor seconds that the first trials need
        errors = Runs.errors()
        stopping, again, wait, tries = False, False, 0.0, LAST_TRIES
        while not stopping or self._dirty:
            if stopping:
                time.sleep(wait)
            stopping = self._drain(stopping, wait) or stopping
            try:
                if not self._connected:
                    self.runs.connect(again=again)
                    self._connected = again = True
                for key in list(self._dirty):
                    self.runs.write(self._dirty[key])
                    del self._dirty[key]
                if stopping and not self._finished:
                    self.runs.pause()
                self.problem, wait = None, FIRST_WAIT
            except errors as error:
                self.problem, self._connected = _message(error), False
                tries -= stopping
                if not tries:
                    return
                wait = FIRST_WAIT if stopping else min(LONGEST_WAIT, max(FIRST_WAIT, 2 * wait))

    def _drain(self, stopping: bool, wait: float) -> bool:
        """Move queued records to `_dirty` during `wait` seconds. If there are none, wait longer for the first one.

        Args:
            stopping: Do not wait.
            wait: Time in seconds.

        Returns:
            True if the end of the queue was reached.
        """
        end = time.monotonic() + wait
        while True:
            left = end - time.monotonic()
            try:
                record = self._queue.get(
                    block=not stopping, timeout=max(0.0, left) if self._dirty or left > 0 else None
                )
            except queue.Empty:
                return False
            if record is None:
                return True
            if not self.runs.has(record):
                self._dirty[record.cell.key] = record


def sync(uri: str, study: Study, folder: Path) -> tuple[int, int]:
    """Fill MLflow from a study's ledger.

    Args:
        uri: MLflow tracking URI.
        study: The study.
        folder: The study's folder.

    Returns:
        The number of ended cells in the ledger, and the number of runs that were created.

    Raises:
        LedgerError: A sweep of the study is running. It writes to MLflow itself.
        TrackingError: MLflow cannot be written.
    """
    ledger = ledgers.Ledger(folder / "ledger.jsonl")
    try:
        found = [r for r in ledgers.records(ledger.events).values() if r.outcome is not None]
        digest = next((event["corpus"] for event in ledger.events if event["event"] == "study"), "unknown")
        runs = Runs(uri, study, folder, digest)
        try:
            runs.connect()
            for record in found:
                runs.write(record)
            last = max((e["time"] for e in ledger.events if e["event"] == "ended"), default=None)
            if found and concluded_after(folder, last):
                verdict = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
                log_verdict(uri, study, str(runs.parent_id), folder, verdict)
                _log_models(uri, study, str(runs.parent_id), folder)
                mark(folder, uri, str(runs.parent_id))
            else:
                runs.pause()
        except Runs.errors() as error:
            said = _message(error)
            damaged = "not a database" in said or "malformed" in said
            advice = "so the damaged file may be moved away and synced again" if damaged else "so sync again later"
            raise TrackingError(
                f"MLflow at {redact(uri)} cannot be written: {said}; the ledger has everything, {advice}"
            ) from error
    finally:
        ledger.close()
    return len(found), runs.created


def _log_models(uri: str, study: Study, parent_id: str, folder: Path) -> None:
    log_models(uri, study, parent_id, folder, ledgers.records(ledgers.read(folder / "ledger.jsonl")).values())


def mark(folder: Path, uri: str, parent: str) -> None:
    """Record that the store has the whole ledger, so that the next sweep of a finished study need not connect to it."""
    (folder / "logs").mkdir(exist_ok=True)
    write_whole(folder / "logs" / "tracked.json", json.dumps(_mark(folder, uri, parent)) + "\n")


def is_marked(folder: Path, uri: str) -> bool:
    """Return True if `mark` was called for this store and the ledger has not changed since.

    Return False also if runs were deleted in a sqlite store since. A server is not asked.
    """
    try:
        recorded = json.loads((folder / "logs" / "tracked.json").read_text(encoding="utf-8"))
        return bool(recorded == _mark(folder, uri, recorded["parent"]))
    except (OSError, ValueError, KeyError, sqlite3.Error):
        return False


def _mark(folder: Path, uri: str, parent: str) -> dict[str, Any]:
    store, path = hashlib.sha256(uri.encode()).hexdigest()[:12], sqlite_file(uri)  # a URI may hold a password
    runs = count_runs(path, parent) if path else None
    return {"store": store, "ledger_bytes": (folder / "ledger.jsonl").stat().st_size, "parent": parent, "runs": runs}


def _message(error: Exception) -> str:
    """Return an error's text on one line, without passwords."""
    return one_line(redact(str(error))) or type(error).__name__


def _snapshot(record: Record) -> Record:
    """Copy a record for the tracking thread, because the study goes on changing the original."""
    return replace(record, curve=list(record.curve), times=list(record.times))
