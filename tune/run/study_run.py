"""One run of a study in this process: what the ledger says, what the stages want, what the tracker is told."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagating.trial import Trial
from tune.decide.stages import Stages
from tune.errors import NODE_LOST, SHORT_OF_MEMORY, LedgerError, StudyError, StudyStopped
from tune.run import ledger
from tune.run.heartbeat import Heart
from tune.run.interrupt import Interruption
from tune.run.ledger import Ledger
from tune.run.models import (
    TRAINED,
    best_cells,
    keeps_model,
    missing_models,
    models_folder,
    place,
    read_facts,
    take_best,
)
from tune.run.progress import Standing
from tune.study.cell import Cell, Record
from tune.study.own_gates import digests, place_gate
from tune.study.sizes import steps
from tune.study.study import Study, digest
from tune.study.trial_spec import trial_spec
from tune.study.weights import noted, place_weights

ATTEMPTS = 3  # of a cell whose machine fails, without any progress between them; the last one has the machine alone
SPACE_SECONDS = 10.0  # between two looks at the disk: counting a model's parameters takes longer than a short cell
NODES_LOST = 30  # so many lost nodes in a row, without progress between them, and the cell itself may be the cause
FATAL = (OSError, LedgerError, StudyError)  # what ends a study: it cannot record what its trials do


@dataclass
class Progress:
    """What a listener is told: the cell that ended, how many did, of how many known ones, and the seconds left."""

    cell: Cell
    outcome: str
    loss: float
    ended: int
    total: int
    seconds_left: float | None


class StudyRun:
    """One run of a study in this process: what the ledger says, what the stages want, what the tracker is told."""

    def __init__(
        self,
        study: Study,
        folder: Path,
        corpus: Path,
        listen: Callable[[Progress], None] | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.study, self.folder, self.corpus = study, folder, corpus
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.tracker: Any | None = None
        self._listen, self._warn = listen, warn
        self._decisions: set[str] = set()
        self.slots = 0  # known once Ray runs
        self.sees_models = False  # whether trials run that leave their model where it can be read here
        self.room = 0  # slots that there are now: nodes of a cluster come and go
        self.tick: Callable[[], None] | None = None  # called some times a second while trials run
        self.heart = Heart(folder)
        self._again: deque[Cell] = deque()  # cells whose machine failed
        self._lost: Counter[str] = Counter()  # attempts that failed since a cell last got further than before
        self._nodes_lost: Counter[str] = Counter()  # the same, of those that ended with their node
        self._reached: dict[str, float] = {}  # share of its budget that a cell has got to, in any attempt
        self._failed_at: dict[str, float] = {}  # where it had got to when its machine failed last
        self._running: set[str] = set()
        self._alone: set[str] = set()  # cells that run with no other beside them
        self.fatal: Exception | None = None  # why the study cannot go on
        self.interruption: Interruption | None = None
        self._warned: set[str] = set()
        self._short_of_space = False
        self._looked_at_space = -math.inf
        self._open(folder)
        self._first = self._next_missing()

    def _open(self, folder: Path) -> None:
        from pagating.data.corpus import read_meta

        meta = read_meta(self.corpus)
        self._vocab_size = meta["vocab_size"]
        known = next((event for event in self.ledger.events if event["event"] == "study"), None)
        if known and known["corpus"] != meta["digest"]:
            raise StudyError(
                f"{folder}: the study was begun on corpus {known['corpus']}; the text or the tokenizer has changed "
                f"(now {meta['digest']}): give the study another name, or bring the old text back"
            )
        gates: dict[str, Any] = {"gates": own} if (own := digests(self.study, folder)) else {}
        if known and known.get("gates", {}) != own:
            raise StudyError(f"{folder}: the gates in {folder / 'gates'} are not those that the study was begun with")
        if not known:
            weights = noted(folder)
            gates |= {"pretrained": weights["sha256"]} if weights else {}
            self.ledger.append("study", schema=ledger.SCHEMA, study=self.study.name, corpus=meta["digest"], **gates)
        self.records: dict[str, Record] = ledger.records(self.ledger.events)
        self._decisions = {_decision(event) for event in self.ledger.events if event["event"] in ("grid", "chosen")}
        self._best = best_cells(self.study, self.records.values())  # by arm, of all that has ended
        suggested = {
            (r.cell.arm, r.cell.index): r.cell.config for r in self.records.values() if r.cell.stage == "search"
        }
        self.stages = Stages(self.study, self._decided, suggested)
        self.ended = 0
        self._standing, self._taken = Standing(self.study, self.ledger.events), len(self.ledger.events)
        self._standing.only(())  # what an earlier run had started was cut off with it

    @property
    def standing(self) -> Standing:
        """Where the study stands, after every event of the ledger."""
        for event in self.ledger.events[self._taken :]:
            self._standing.take(event)
        self._taken = len(self.ledger.events)
        return self._standing

    def pulse(self, room: int) -> None:
        """Ray runs, with `room` slots: show it."""
        self.room = room
        self.heart.beat(room, self._running)
        if self.tick:
            self.tick()

    def _decided(self, event: str, **fields: Any) -> None:
        """Write a decision between stages, once: a replay leads to the same ones."""
        if _decision({"event": event, **fields}) not in self._decisions:
            self._decisions.add(_decision(self.ledger.append(event, **fields)))

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles what it drives; nothing of Ray's copy is ever used, so it holds nothing."""
        return {}

    # --- the cells ---

    @property
    def stopping(self) -> bool:
        """Whether no more cells are handed out and the running ones are cut off."""
        return self.fatal is not None or (self.interruption is not None and self.interruption.caught is not None)

    def checkpoints(self, cell: Cell) -> Path:
        """The folder of a cell's checkpoints, as an absolute path: in the study's storage, where it has one."""
        from pagating.checkpoint import folder_name

        return self.all_checkpoints / folder_name(cell.key)

    def keeps_model(self, cell: Cell) -> bool:
        """Whether a cell is to leave its trained model in the folder of its checkpoints."""
        return self.sees_models and keeps_model(self.study, cell)

    def _keep_model(self, cell: Cell) -> None:
        """Take the model that a cell left, now or before a crash, where it is its arm's best so far."""
        trained, record = self.checkpoints(cell) / TRAINED, self.records[cell.key]
        take_best(self.study, self._best, record)
        if self._best.get(cell.arm) is record and read_facts(trained):
            try:
                place(models_folder(self.study, self.folder), record, trained)
            except OSError as error:
                self.warn(f"{cell.key}: its trained model is not kept: {error}")

    def warn_of_missing_models(self) -> None:
        """Name the arms whose best model could not be kept."""
        for line in missing_models(self.study, self.folder, self.records.values()) if self.sees_models else []:
            self.warn(line)

    @property
    def all_checkpoints(self) -> Path:
        """The folder of the folders of all cells' checkpoints."""
        storage = self.study.storage
        return (Path(storage) / self.study.name if storage else self.folder.resolve()) / "checkpoints"

    @property
    def missing(self) -> bool:
        """Whether any cell is left to train."""
        return self._first is not None or not self.stages.finished

    def next_cell(self) -> Cell | None:
        """The next cell to train; None while it depends on cells that still run, or when none is left."""
        if self._running & self._alone:
            return None
        if self._again:
            return None if self._again[0].key in self._alone and self._running else self._again.popleft()
        if self._first is not None:
            cell, self._first = self._first, None
            return cell
        return self._next_missing()

    def _next_missing(self) -> Cell | None:
        """Cells that the ledger knows to have ended are passed through the stages again."""
        while (cell := self.stages.next_cell()) is not None:
            record = self.records.get(cell.key)
            if record is None:
                self.ledger.append(
                    "suggested",
                    cell=cell.key,
                    stage=cell.stage,
                    arm=cell.arm,
                    index=cell.index,
                    seed=cell.seed,
                    config=cell.config,
                    config_key=cell.config_key,
                )
                self.records[cell.key] = Record(cell)
            elif record.outcome not in (None, "failed"):
                for row in record.curve:
                    self.stages.should_stop(cell, row["step"] / self.steps, row["val_nll"])
                self._complete(cell, record.outcome, record.final)
                continue
            return cell
        return None

    @property
    def steps(self) -> int:
        """Optimiser updates of a trial that is not stopped."""
        return steps(self.study)

    def start(self, cell: Cell) -> Trial:
        """Record that a cell starts; return its trial."""
        event = self.ledger.append("started", cell=cell.key)
        record = self.records[cell.key]
        record.started, record.curve, record.times = event["time"], [], []
        self._running.add(cell.key)
        if self.tracker:
            self.tracker.started(record)
        trial = trial_spec(self.study, cell.arm, cell.config, cell.seed, self.corpus, test=self.study.tests(cell.stage))
        return place_weights(place_gate(trial, self.folder), self.folder)

    def alive(self, cell: Cell, fraction: float, warning: str | None = None) -> None:
        """A running cell is at `fraction` of its budget, and has something to say to the user or not."""
        self._reached[cell.key] = max(fraction, self._reached.get(cell.key, 0.0))
        self._watch_space()  # trials may take days
        if warning:
            self.warn(f"{cell.key}: {warning}")

    def warn(self, line: str) -> None:
        """Say something to the user, once."""
        if line not in self._warned and self._warn:
            self._warn(line)
        self._warned.add(line)

    def report(self, cell: Cell, row: dict[str, Any]) -> None:
        """Record an evaluation of a running cell."""
        event = self.ledger.append("report", sync=False, cell=cell.key, row=row)
        record = self.records[cell.key]
        record.curve.append(row)
        record.times.append(event["time"])
        if self.tracker:
            self.tracker.reported(record, row)

    def end(self, cell: Cell, outcome: str, final: dict[str, Any], reason: str | None = None) -> None:
        """Record how a cell ended, then let the stages go on.

        A cell of the search or the grid whose machine failed for good ends the run: the stages never choose without it.
        """
        record = self.records[cell.key]
        event = self.ledger.append("ended", cell=cell.key, outcome=outcome, final=final, reason=reason)
        record.outcome, record.final, record.reason, record.ended = outcome, final, reason, event["time"]
        if self.tracker:
            self.tracker.ended(record)
        self._running.discard(cell.key)
        if outcome == "failed":
            if self._try_again(cell, reason or ""):
                return
            if cell.stage != "confirm":  # what is chosen next would depend on which machine failed
                said = f"{cell.key} failed again and again, the last time: {reason}"
                self.fatal = StudyStopped(f"{said}; the same command tries it anew")
                return
        self._complete(cell, outcome, final)
        kept = self.study.keep.checkpoints  # then of a model that is not its arm's best nothing stays but they
        shutil.rmtree(self.checkpoints(cell) / TRAINED if kept else self.checkpoints(cell), ignore_errors=True)
        self._watch_space()
        if self._listen:
            left = self.stages.remaining()
            seconds = self.standing.seconds_left(self.room or self.slots, time.time())
            loss = final.get("val_nll", math.inf)
            self._listen(Progress(cell, outcome, loss, self.ended, self.ended + left, seconds[0] if seconds else None))

    def _watch_space(self) -> None:
        """Warn while there is time, when the disk has less room than the cells that are left may take."""
        from tune.plan.space import check_space, disk_needed

        if time.monotonic() - self._looked_at_space < SPACE_SECONDS:
            return
        self._looked_at_space = time.monotonic()
        left = self.stages.remaining()
        try:
            check_space(self.folder, disk_needed(self.study, self.slots or 1, vocab_size=self._vocab_size, cells=left))
        except StudyError as error:
            if not self._short_of_space and self._warn:
                self._warn(str(error))
            self._short_of_space = True

    def _try_again(self, cell: Cell, reason: str) -> bool:
        """Whether a cell whose machine failed is trained again, from its last checkpoint.

        Each failure without progress since the one before counts, that of a whole node apart; a machine short of
        memory, and the last attempt, get the cell alone.
        """
        key, reached = cell.key, self._reached.get(cell.key, 0.0)
        node = reason.startswith(NODE_LOST)  # no fault of the cell's: spot machines go as they please
        lost, most = (self._nodes_lost, NODES_LOST) if node else (self._lost, ATTEMPTS)
        lost[key] = 1 if reached > self._failed_at.get(key, 0.0) else lost[key] + 1
        self._failed_at[key] = reached
        if not node and (SHORT_OF_MEMORY in reason or lost[key] == ATTEMPTS - 1):
            self._alone.add(key)
        if lost[key] >= most:
            return False
        self._again.append(cell)
        return True

    def _complete(self, cell: Cell, outcome: str, final: dict[str, Any]) -> None:
        self._keep_model(cell)
        self.ended += 1
        loss = final.get("val_nll", math.inf)
        if cell.stage == "confirm":  # what the verdict is computed on
            loss = final.get("test_nll", loss)
        self.stages.complete(cell, outcome, loss, int(final.get("steps", 0)))


def _decision(event: dict[str, Any]) -> str:
    return digest({name: value for name, value in event.items() if name not in ("time", "crc")})
