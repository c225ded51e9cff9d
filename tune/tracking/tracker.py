"""MLflow, filled from the ledger in the background: a slow or dead tracking server costs the trials nothing.

What it missed is written when it is back, by the same sweep, by the next one, or by `pagating sync`.
"""

from __future__ import annotations

import hashlib
import json
import math
import queue
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
from tune.study.cell import Record
from tune.study.study import Study
from tune.tracking.models import log_models
from tune.tracking.runs import Runs
from tune.tracking.views import log_verdict

HOLD_BACK = 30.0  # seconds at most, from the start of a sweep, in which MLflow is not loaded
LAST_TRIES = 3  # of a store that answers with an error while the study waits for nothing else


class MlflowTracker:
    """Writes cells to MLflow from a thread of its own, so that `started`, `reported` and `ended` return at once.

    Args:
        uri: MLflow tracking URI.
        study: The study.
        folder: The study's folder.
        meta: Content of the packed corpus's `corpus.json`, for its digest and sizes.
    """

    def __init__(self, uri: str, study: Study, folder: Path, meta: Mapping[str, Any]) -> None:
        tokens = {split: counts["tokens"] for split, counts in meta["splits"].items()}
        self.runs = Runs(uri, study, folder, meta["digest"], tokens)
        self._queue: queue.Queue[Record | None] = queue.Queue()
        self._dirty: dict[str, Record] = {}
        self._connected = False
        self._finished = True
        self.problem: str | None = None
        self._trained = threading.Event()  # a trial has got somewhere, or none will
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    @property
    def parent_id(self) -> str | None:
        """Run id of the study's parent run, once MLflow has answered."""
        return self.runs.parent_id

    # --- called by the study, never wait ---

    def started(self, record: Record) -> None:
        """A cell starts (again): its run appears as RUNNING."""
        self._queue.put(_as_it_stands(record))

    def reported(self, record: Record, row: dict[str, Any]) -> None:
        """A cell has a new evaluation."""
        self._queue.put(_as_it_stands(record))
        self._trained.set()

    def ended(self, record: Record) -> None:
        """A cell has ended."""
        self._queue.put(_as_it_stands(record))
        self._trained.set()

    @property
    def owed(self) -> int:
        """Cells that MLflow does not have yet as the ledger has them."""
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
        """Write what is left; `owed` is then the number of cells that could not be written.

        Args:
            records: All cells of the study, those of earlier sweeps too.
            finished: Whether the study is finished. A store that lags behind is then waited for as long as it gets on.
            patience: Seconds to wait for one cell if the study is finished, else for all of them.
            warn: Called with a line if the store is waited for.
        """
        self._finished = finished
        for record in records:
            if record.outcome is not None:
                self._queue.put(_as_it_stands(record))
        self._queue.put(None)
        self._trained.set()
        left = math.inf
        while self._thread.is_alive() and self.owed < left:
            if left < math.inf:
                warn(
                    f"MLflow lags behind by {self.owed} cells and is waited for; Ctrl-C leaves them to `pagating sync`"
                )
            left = self.owed if finished else 0
            self._thread.join(patience)
        if self.owed and self._thread.is_alive():
            self.problem = self.problem or f"it was given {patience:g} s more"

    def finish(self, verdict: dict[str, Any]) -> str | None:
        """Write the verdict of a finished study whose cells MLflow has; return a line on what is owed, or None."""
        runs, where = self.runs, redact(self.runs.uri)
        owed, problem, lacking = self.owed, self.problem, "the verdict"
        if not owed and runs.parent_id:
            try:
                log_verdict(runs.uri, runs.study, runs.parent_id, runs.folder, verdict)
                lacking = "the trained models"
                _log_models(runs.uri, runs.study, runs.parent_id, runs.folder)
            except Runs.errors() as error:
                problem = _said(error)
            else:
                mark(runs.folder, runs.uri)
                return None
        return (
            f"MLflow at {where} still lacks {f'{owed} cells and ' if owed else ''}{lacking}"
            f"{f' ({problem})' if problem else ''}; the ledger has all of it: run `pagating sync {runs.folder}` when "
            "MLflow is back, or the same sweep again"
        )

    # --- the thread ---

    def _work(self) -> None:
        self._trained.wait(HOLD_BACK)  # MLflow takes seconds of a processor to load, which the first trials need
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
                self.problem, wait = None, 1.0
            except errors as error:
                self.problem, self._connected = _said(error), False
                tries -= stopping
                if not tries:
                    return
                wait = 1.0 if stopping else min(30.0, max(1.0, 2 * wait))

    def _drain(self, stopping: bool, wait: float) -> bool:
        """Move queued records to the dirty ones, waiting up to `wait` seconds (at least for one); True at the end."""
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
    """Fill MLflow from a study's ledger; cells that the ledger has, and runs that were written now.

    Raises LedgerError while a sweep of the study runs (which writes to MLflow itself), TrackingError where MLflow
    cannot be written.
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
            if (folder / "verdict.json").is_file():
                verdict = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
                log_verdict(uri, study, str(runs.parent_id), folder, verdict)
                _log_models(uri, study, str(runs.parent_id), folder)
                mark(folder, uri)
            else:
                runs.pause()
        except Runs.errors() as error:
            raise TrackingError(
                f"MLflow at {redact(uri)} cannot be written: {_said(error)}; the ledger has everything, so a damaged "
                "mlflow.db may be moved away and synced anew"
            ) from error
    finally:
        ledger.close()
    return len(found), runs.created


def _log_models(uri: str, study: Study, parent_id: str, folder: Path) -> None:
    log_models(uri, study, parent_id, folder, ledgers.records(ledgers.read(folder / "ledger.jsonl")).values())


def mark(folder: Path, uri: str) -> None:
    """Note that the store has all that the ledger holds, so that the next sweep of a finished study need not ask it."""
    (folder / "logs").mkdir(exist_ok=True)
    write_whole(folder / "logs" / "tracked.json", json.dumps(_mark(folder, uri)) + "\n")


def is_marked(folder: Path, uri: str) -> bool:
    """Whether the store had all that the ledger holds when it was last asked; a store that is a file must be there."""
    note = folder / "logs" / "tracked.json"
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return False
    return note.is_file() and note.read_text(encoding="utf-8") == json.dumps(_mark(folder, uri)) + "\n"


def _mark(folder: Path, uri: str) -> dict[str, Any]:
    store = hashlib.sha256(uri.encode()).hexdigest()[:12]  # a URI may hold a password
    return {"store": store, "ledger_bytes": (folder / "ledger.jsonl").stat().st_size}


def _said(error: Exception) -> str:
    return one_line(redact(str(error))) or type(error).__name__


def _as_it_stands(record: Record) -> Record:
    """A copy for the tracking thread: the study goes on changing its own, an end could be seen half written."""
    return replace(record, curve=list(record.curve), times=list(record.times))
