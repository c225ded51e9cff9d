"""One run of a study in this process. A backend reports to it; it updates ledger, stages, tracker and kept models."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune.decide.calibrate import form_of
from tune.decide.ladder import Configs, Ladder
from tune.decide.stages import Stages
from tune.errors import PagatingError, StudyError, StudyStopped
from tune.run import ledger as ledgers
from tune.run.extend import groups, looked
from tune.run.heartbeat import HeartbeatWriter
from tune.run.interrupt import Interruption
from tune.run.kept.models import BestModels
from tune.run.ledger import Ledger, MemoryLedger
from tune.run.progress import Progress, progress_of
from tune.run.retries import Retries
from tune.run.tracker import NoTracker, Tracker
from tune.study.cell import Cell, Record, folder_name
from tune.study.sizes import steps
from tune.study.study import Study, digest
from tune.subject.subject import TRAINED, Job, Subject

SPACE_SECONDS = 10.0  # between two checks of the disk; a check counts parameters, which is slower than a short cell
DECISIONS = ("grid", "corners", "chosen", "look", "dropped")  # events that a replay repeats
FATAL = (
    OSError,
    PagatingError,
)  # errors with a message for the user that end a study, because it can no longer record its trials


@dataclass
class CellEnded:
    """A cell that ended, reported to a listener.

    Attributes:
        cell: The cell.
        outcome: Its outcome.
        loss: Its validation loss in nats per token, or infinity.
        ended: Number of cells that have ended.
        total: Number of cells that have ended or may follow.
        seconds_left: Expected seconds until the study ends. None means unknown.
        metric: Name of the loss, which has the sign that its user knows.
        setting: Values of hyperparameters in words (`Study.setting`).
    """

    cell: Cell
    outcome: str
    loss: float
    ended: int
    total: int
    seconds_left: float | None
    metric: str = "val_nll"
    setting: str = ""


class StudyRun:
    """One run of a study in this process.

    A backend calls `next_cell`, `start`, `cell_heartbeat`, `report` and `end`. It stops if `stopping` is true.

    Args:
        study: The study.
        folder: The study's folder. None keeps nothing on disk and uses a `MemoryLedger`.
        subject: The subject that the arms train.
        ledger: The ledger. None means `ledger.jsonl` of the folder.
        tracker: Tracker that shows the cells. None shows nothing.
        listen: Called with each cell that ended.
        warn: Called with each warning for the user, one line each.
        interruption: Handler of signals and of a time budget. The run stops if it says so.
        check_space: Called from time to time with the number of cells left. It raises StudyError if the disk is too
            small.
        decided: Fields of the ledger's first event on what was decided when the study started. Not used later on.

    Raises:
        LedgerError: The ledger is damaged, or another process has it.
        StudyError: The study was started with other inputs.
    """

    def __init__(
        self,
        study: Study,
        folder: Path | None,
        subject: Subject,
        *,
        ledger: Ledger | MemoryLedger | None = None,
        tracker: Tracker | None = None,
        listen: Callable[[CellEnded], None] | None = None,
        warn: Callable[[str], None] | None = None,
        interruption: Interruption | None = None,
        check_space: Callable[[int], None] | None = None,
        decided: Mapping[str, Any] | None = None,
    ) -> None:
        if ledger is None:
            ledger = Ledger(folder / "ledger.jsonl") if folder else MemoryLedger()
        self.study, self.subject, self.ledger, self.interruption = study, subject, ledger, interruption
        self.tracker: Tracker = tracker or NoTracker()
        self._folder = folder
        self._listen, self._warn, self._check_space = listen, warn, check_space
        self._warned: set[str] = set()
        self._short_of_space, self._space_checked = False, -math.inf
        self._heartbeats = HeartbeatWriter(folder) if folder else None
        self.slots = 0  # at the start; 0 before a backend has begun
        self.slots_now = 0  # nodes of a cluster join and leave
        self.on_heartbeat: Callable[[], None] | None = None  # called several times per second while trials run
        self.fatal: Exception | None = None
        self._retries, self._running = Retries(), set[str]()
        self._rungs: dict[int, Study] = {}
        try:
            self._begin(decided or {})
        except BaseException:  # a traceback may keep this object, and the same process tries again
            ledger.close()
            raise

    def _begin(self, decided: Mapping[str, Any]) -> None:
        """Restore the state of the study from the ledger."""
        known = next((event for event in self.ledger.events if event["event"] == "study"), None)
        if known:
            gates = dict(known.get("gates", {}))
            for event in self.ledger.events:
                gates |= event["gates"] if event["event"] == "gates" else {}
            self.subject.check_begun({**known, "gates": gates})
            now = self.subject.identity().get("gates", {})
            if new := {name: digest for name, digest in now.items() if name not in gates}:
                self.ledger.append("gates", gates=new)
        else:
            fields = {"schema": ledgers.SCHEMA, "study": self.study.name, **self.subject.identity(), **decided}
            self.ledger.append("study", sync=True, **fields)
        self.records: dict[str, Record] = ledgers.records(self.ledger.events)
        self._decisions = {_decision(event) for event in self.ledger.events if event["event"] in DECISIONS}
        self.models = BestModels(self.study, self._folder, self.records.values())
        self.stages: Stages | Ladder = (
            Ladder(self.study, self._stages, self._decided) if self.study.scales else self._stages(self.study, None)
        )
        self.ended = 0
        self._progress, self._taken = progress_of(self.study, self.ledger.events), len(self.ledger.events)
        self._progress.set_running(())  # cells that an earlier run left unfinished do not run now
        self._first = self._next_missing()

    def _stages(self, study: Study, start: Configs | None) -> Stages:
        """Return the stages of the study, or of a rung's study, after the events of the ledger."""
        events = ledgers.of_rung(self.ledger.events, study.rung)
        cells = [record.cell for record in self.records.values() if record.cell.rung == study.rung]
        named = {"rung": study.rung} if study.rung else {}
        grids = [event for event in events if event["event"] == "grid"]
        rates = [event["grid"] for event in grids if event.get("nuisance", "lr") == "lr"]
        return Stages(
            study,
            lambda event, **fields: self._decided(event, **named, **fields),
            {(cell.arm, cell.index): cell.config for cell in cells if cell.stage == "search"},
            groups(events, study.arms)[1:],
            looked(study, self._folder, events),
            {(cell.arm, cell.seed) for cell in cells if cell.stage == "confirm"},
            form_of(grids, study.calibrate.seeds),
            start,
            rates[0] if rates else None,
        )

    def _steps(self, cell: Cell) -> int:
        """Return the updates of a cell's whole trial."""
        if cell.rung not in self._rungs:
            self._rungs[cell.rung] = self.study.at(cell.rung)
        study = self._rungs[cell.rung]
        return study.length(cell.arm, steps(study, cell.config))

    def _decided(self, event: str, **fields: Any) -> None:
        """Record a decision between stages, unless it is recorded already: a replay repeats decisions."""
        if _decision({"event": event, **fields}) not in self._decisions:
            self._decisions.add(_decision(self.ledger.append(event, **fields)))

    def __getstate__(self) -> dict[str, Any]:
        """Return an empty state. Ray pickles this object but never uses the copy."""
        return {}

    # --- state ---

    @property
    def folder(self) -> Path:
        """The study's folder. Reading it raises StudyError if the run keeps nothing on disk."""
        if self._folder is None:
            raise StudyError(f"{self.study.name}: this run writes nothing to disk, so it has no folder")
        return self._folder

    @property
    def progress(self) -> Progress:
        """Progress of the study after all events of the ledger."""
        for event in self.ledger.events[self._taken :]:
            self._progress.take(event)
        self._taken = len(self.ledger.events)
        return self._progress

    @property
    def stopping(self) -> bool:
        """True if no more cells may start and the running ones have to stop."""
        return self.fatal is not None or (self.interruption is not None and self.interruption.stopping)

    @property
    def missing(self) -> bool:
        """True if a cell is left to train."""
        return self._first is not None or not self.stages.finished

    @property
    def all_checkpoints(self) -> Path:
        """Absolute folder of all cells' checkpoints. It is in the study's storage, if it has one."""
        storage = self.study.storage
        return (Path(storage) / self.study.name if storage else self.folder.resolve()) / "checkpoints"

    def checkpoints(self, cell: Cell) -> Path:
        """Return the absolute folder of a cell's checkpoints."""
        return self.all_checkpoints / folder_name(cell.key)

    # --- called by a backend ---

    def begin(self, slots: int, sees_models: bool) -> None:
        """Start the run with a number of slots. `sees_models`: this process can read the models that trials write."""
        self.slots = self.slots_now = slots
        self.models.visible = sees_models

    def heartbeat(self, slots: int) -> None:
        """Write a heartbeat of the run with its current number of slots."""
        self.slots_now = slots
        if self._heartbeats:
            self._heartbeats.write(slots, self._running)
        if self.on_heartbeat:
            self.on_heartbeat()

    def next_cell(self) -> Cell | None:
        """Return the next cell to train. Return None if it depends on cells that still run, or if none is left."""
        if self._retries.blocks(self._running):
            return None
        if again := self._retries.take():
            return again
        if self._first is not None:
            cell, self._first = self._first, None
            return cell
        return self._next_missing()

    def _next_missing(self) -> Cell | None:
        """Replay the cells that have ended in the stages; return the first cell that has not ended, or None."""
        while (cell := self.stages.next_cell()) is not None:
            record = self.records.get(cell.key)
            if record is None:
                more: dict[str, Any] = {"axis": cell.axis} if cell.axis else {}
                more |= {"rung": cell.rung} if cell.rung else {}
                self.ledger.append(
                    "suggested",
                    cell=cell.key,
                    stage=cell.stage,
                    arm=cell.arm,
                    index=cell.index,
                    seed=cell.seed,
                    config=cell.config,
                    config_key=cell.config_key,
                    **more,
                )
                self.records[cell.key] = Record(cell)
            elif record.outcome not in (None, "failed"):
                whole = self._steps(cell)
                for row in record.curve:
                    self.stages.should_stop(cell, row["step"] / whole, row["val_nll"])
                self._complete(cell, record.outcome, record.final)
                continue
            return cell
        return None

    def start(self, cell: Cell) -> Job:
        """Record that a cell starts; return its job for a worker."""
        event = self.ledger.append("started", cell=cell.key)
        record = self.records[cell.key]
        record.started, record.curve, record.times = event["time"], [], []
        self._running.add(cell.key)
        self.tracker.started(record)
        return Job(
            cell.key,
            self.subject.trial(cell),
            self.subject.train,
            str(self.checkpoints(cell)) if self._folder else None,
            self._steps(cell),
            self.study.keep.checkpoints,
            self.models.wanted(cell),
        )

    def cell_heartbeat(self, cell: Cell, fraction: float, warning: str | None = None) -> None:
        """Record a heartbeat of a running cell.

        Args:
            cell: The cell.
            fraction: Fraction of its budget that it has reached.
            warning: A line for the user, or None.
        """
        self._retries.reached(cell, fraction)
        self._watch_space()  # here too, because a trial may take days
        if warning:
            self.warn(f"{cell.key}: {warning}")

    def warn(self, line: str) -> None:
        """Show a warning to the user, each only once."""
        if line not in self._warned and self._warn:
            self._warn(line)
        self._warned.add(line)

    def report(self, cell: Cell, row: dict[str, Any]) -> None:
        """Record an evaluation of a running cell."""
        event = self.ledger.append("report", sync=False, cell=cell.key, row=row)
        record, row = self.records[cell.key], event["row"]
        record.curve.append(row)
        record.times.append(event["time"])
        self.tracker.reported(record, row)

    def should_stop(self, cell: Cell, fraction: float, loss: float) -> bool:
        """Return True if a running cell has to stop early. `loss` is that of the evaluation at `fraction`."""
        return self.stages.should_stop(cell, fraction, loss)

    def end_early(self, cell: Cell, seconds: float) -> None:
        """Record that a cell was stopped early after its last evaluation. `seconds` is its training time."""
        row = self.records[cell.key].curve[-1]
        kept: dict[str, Any] = {
            name: row[name] for name in ("val_nll", "train_nll", "tokens", "tokens_per_second") if name in row
        }
        self.end(cell, "stopped_early", {**kept, "steps": row["step"], "seconds": seconds})

    def end(self, cell: Cell, outcome: str, final: dict[str, Any], reason: str | None = None) -> None:
        """Record the outcome of a cell and pass it to the stages, or retry the cell if its machine failed.

        If retries of a cell of the search or calibrate stage are used up, the run stops, because the stages must not
        choose without that cell. A confirm cell is left out, unless `must_not_lose` says otherwise.

        Args:
            cell: The cell.
            outcome: Its outcome.
            final: Its final losses and costs.
            reason: Cause of an infeasible or failed outcome.
        """
        record = self.records[cell.key]
        event = self.ledger.append("ended", cell=cell.key, outcome=outcome, final=final, reason=reason)
        final = event["final"]
        record.outcome, record.final, record.reason, record.ended = outcome, final, reason, event["time"]
        self.tracker.ended(record)
        self._running.discard(cell.key)
        if outcome == "failed":
            if self._retries.failed(cell, reason or ""):
                return
            if self.stages.must_not_lose(cell):  # otherwise the choice would depend on which machine failed
                self.fatal = StudyStopped(self._why_lost(cell))
                return
        self._complete(cell, outcome, final)
        if self._folder:
            kept = self.study.keep.checkpoints  # then remove only the model, which is left if it is not the best
            shutil.rmtree(self.checkpoints(cell) / TRAINED if kept else self.checkpoints(cell), ignore_errors=True)
        self._watch_space()
        if self._listen:
            left = self.stages.remaining()
            seconds = self.progress.seconds_left(self.slots_now or self.slots, time.time())
            loss = final.get("val_nll", math.inf)
            name, sign = self.study.shown.get("val_nll", "val_nll"), self.study.sign
            loss = sign * loss if math.isfinite(loss) else loss
            ahead = seconds[0] if seconds else None
            setting = self.study.setting(cell.config)
            self._listen(CellEnded(cell, outcome, loss, self.ended, self.ended + left, ahead, name, setting))

    def _why_lost(self, cell: Cell) -> str:
        """Return why the study cannot go on after a cell has failed for good."""
        if cell.stage != "confirm":
            failures = f"{cell.key} failed again and again, the last time: {self.records[cell.key].reason}"
            return f"{failures}; the same command tries it again"
        stage = (cell.rung, "confirm", cell.arm)
        lost = [each for each in self.records.values() if (each.cell.rung, each.cell.stage, each.cell.arm) == stage]
        failures = f"each confirm trial of {cell.arm} failed again and again, {lost[0].cell.key}: {lost[0].reason}"
        return f"{failures}; the same command tries them again"

    def _complete(self, cell: Cell, outcome: str, final: dict[str, Any]) -> None:
        if self._folder and (problem := self.models.take(self.records[cell.key], self.checkpoints(cell) / TRAINED)):
            self.warn(problem)
        self.ended += 1
        loss = final.get("val_nll", math.inf)
        if cell.stage == "confirm":  # the verdict is computed on the test loss
            loss = final.get("test_nll", loss)
        self.stages.complete(cell, outcome, loss, int(final.get("steps", 0)))

    def _watch_space(self) -> None:
        """Warn early if the disk is too small for the cells that are left."""
        if self._check_space is None or time.monotonic() - self._space_checked < SPACE_SECONDS:
            return
        self._space_checked = time.monotonic()
        try:
            self._check_space(self.stages.remaining())
        except StudyError as error:
            if not self._short_of_space:
                self.warn(str(error))
            self._short_of_space = True

    def give_up(self, error: Exception) -> None:
        """End the run because of an error. The first one counts."""
        self.fatal = self.fatal or error

    def raise_if_fatal(self) -> None:
        """Raise StudyStopped if the run cannot continue."""
        if (fatal := self.fatal) is not None:
            named = isinstance(fatal, OSError) and fatal.filename
            cause = f"{fatal.filename}: {fatal.strerror}" if named else str(fatal)  # type: ignore[attr-defined]
            if not isinstance(fatal, FATAL):  # an error of our own code
                log = f"; see {self._folder / 'logs'}" if self._folder else ""
                cause = f"{type(fatal).__name__}: {cause}{log}"
            raise StudyStopped(f"the study stopped: {cause}") from fatal

    def close(self) -> None:
        """Close the ledger and remove the heartbeat."""
        if self._heartbeats:
            self._heartbeats.stop()
        self.ledger.close()


def _decision(event: dict[str, Any]) -> str:
    """Return a digest of a decision without its time and checksum."""
    return digest({name: value for name, value in event.items() if name not in ("time", "crc")})
