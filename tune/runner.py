"""Runs a study: ledger, stages, Ray Tune and tracking put together.

One `Tuner.fit` runs all stages, so that actors are started once: its search algorithm hands out cells as the stages
allow, its scheduler asks the stages what to stop. What Ray knows is never needed again: the ledger is the source of
truth.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune import ledger as ledgers
from tune.ledger import Cell, Ledger, Record
from tune.provenance import write_provenance
from tune.stages import Stages
from tune.study import Study, StudyError, digest, dump, parse, trial_spec

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_THRESHOLD_S": "1000",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

ATTEMPTS = 3  # of a cell whose machine fails


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
        self, study: Study, folder: Path, corpus: Path, listen: Callable[[Progress], None] | None = None
    ) -> None:
        self.study, self.folder, self.corpus = study, folder, corpus
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.tracker: Any | None = None
        self._listen = listen
        self._decisions: set[str] = set()
        self.slots = 0  # known once Ray runs
        self._begun: float | None = None  # when the first cell started
        self._ended_here = 0
        self._again: deque[Cell] = deque()  # cells whose machine failed
        self._lost: Counter[str] = Counter()
        self._open(folder)
        self._first = self._next_missing()

    def _open(self, folder: Path) -> None:
        from pagating.corpus import read_meta

        meta = read_meta(self.corpus)
        known = next((event for event in self.ledger.events if event["event"] == "study"), None)
        if known and known["corpus"] != meta["digest"]:
            raise StudyError(
                f"{folder}: the study was begun on corpus {known['corpus']}; the text or the tokenizer has changed "
                f"(now {meta['digest']}): give the study another name, or bring the old text back"
            )
        if not known:
            self.ledger.append("study", schema=ledgers.SCHEMA, study=self.study.name, corpus=meta["digest"])
        self.records: dict[str, Record] = ledgers.records(self.ledger.events)
        self._decisions = {_decision(event) for event in self.ledger.events if event["event"] in ("grid", "chosen")}
        suggested = {
            (r.cell.arm, r.cell.index): r.cell.config for r in self.records.values() if r.cell.stage == "search"
        }
        self.stages = Stages(self.study, self._decided, suggested)
        self.ended = 0

    def _decided(self, event: str, **fields: Any) -> None:
        """Write a decision between stages, once: a replay leads to the same ones."""
        if _decision({"event": event, **fields}) not in self._decisions:
            self._decisions.add(_decision(self.ledger.append(event, **fields)))

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles what it drives; nothing of Ray's copy is ever used, so it holds nothing."""
        return {}

    # --- the cells ---

    @property
    def missing(self) -> bool:
        """Whether any cell is left to train."""
        return self._first is not None or not self.stages.finished

    def next_cell(self) -> Cell | None:
        """The next cell to train; None while it depends on cells that still run, or when none is left."""
        if self._first is not None:
            cell, self._first = self._first, None
            return cell
        return self._again.popleft() if self._again else self._next_missing()

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
        return self.study.fixed.tokens // self.study.fixed.batch_tokens

    def start(self, cell: Cell) -> dict[str, Any]:
        """Record that a cell starts; return the arguments of its `Trial`."""
        event = self.ledger.append("started", cell=cell.key)
        self._begun = self._begun or time.monotonic()
        record = self.records[cell.key]
        record.started, record.curve = event["time"], []
        if self.tracker:
            self.tracker.started(record)
        return trial_spec(self.study, cell.arm, cell.config, cell.seed, self.corpus, test=cell.stage == "confirm")

    def report(self, cell: Cell, row: dict[str, Any]) -> None:
        """Record an evaluation of a running cell."""
        self.ledger.append("report", sync=False, cell=cell.key, row=row)
        record = self.records[cell.key]
        record.curve.append(row)
        if self.tracker:
            self.tracker.reported(record, row)

    def end(self, cell: Cell, outcome: str, final: dict[str, Any], reason: str | None = None) -> None:
        """Record how a cell ended, then let the stages go on."""
        record = self.records[cell.key]
        event = self.ledger.append("ended", cell=cell.key, outcome=outcome, final=final, reason=reason)
        record.outcome, record.final, record.reason, record.ended = outcome, final, reason, event["time"]
        if self.tracker:
            self.tracker.ended(record)
        self._ended_here += 1
        self._lost[cell.key] += outcome == "failed"
        if outcome == "failed" and self._lost[cell.key] < ATTEMPTS:
            self._again.append(cell)
            return
        self._complete(cell, outcome, final)
        if self._listen:
            left = self.stages.remaining()
            pace = (time.monotonic() - (self._begun or 0.0)) / self._ended_here
            loss = final.get("val_nll", math.inf)
            self._listen(Progress(cell, outcome, loss, self.ended, self.ended + left, pace * left))

    def _complete(self, cell: Cell, outcome: str, final: dict[str, Any]) -> None:
        self.ended += 1
        loss = final.get(
            "test_nll", final.get("val_nll", math.inf)
        )  # what the verdict is computed on, where there is one
        self.stages.complete(cell, outcome, loss, int(final.get("steps", 0)))


def _decision(event: dict[str, Any]) -> str:
    return digest({name: value for name, value in event.items() if name not in ("time", "crc")})


# --- Ray -------------------------------------------------------------------------------------------------------------


def _tune_parts(run: StudyRun) -> tuple[Any, Any, Any]:
    """Search algorithm, scheduler and callback of Ray Tune, all three views of one StudyRun."""
    from ray import tune as ray_tune
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler
    from ray.tune.search import Searcher

    cells: dict[str, Cell] = {}  # by Ray's trial id
    stopped: set[str] = set()

    class Cells(Searcher):
        """Hands out cells as the stages allow."""

        def __init__(self) -> None:
            super().__init__(metric="fraction", mode="max")

        def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
            cell = run.next_cell()
            if cell is None:
                return Searcher.FINISHED if run.stages.finished else None
            cells[trial_id] = cell
            return {"cell": cell.key, "trial": run.start(cell)}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            """Ends are taken by the callback, which sees the trial's error too."""

        def save(self, checkpoint_path: str) -> None:
            """Nothing of Ray's is ever restored: the ledger is."""

        def restore(self, checkpoint_path: str) -> None:
            raise RuntimeError("a study is continued from its ledger, never from Ray's state")

    class StopWithinArm(FIFOScheduler):
        """Asks the stages whether a trial goes on."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            cell = cells[trial.trial_id]  # the result comes flattened
            if run.stages.should_stop(cell, result["fraction"], result["row/val_nll"]):
                stopped.add(trial.trial_id)
                return TrialScheduler.STOP
            return TrialScheduler.CONTINUE

    class Records(ray_tune.Callback):
        """Records what trials report and how they end. A trial that was cut off is not recorded: it runs again."""

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            if result.get("row"):
                run.report(cells[trial.trial_id], result["row"])

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            cell, result = cells[trial.trial_id], trial.last_result or {}
            if trial.trial_id in stopped:
                row = run.records[cell.key].curve[-1]
                kept = {name: row[name] for name in ("val_nll", "train_nll", "tokens", "tokens_per_second")}
                run.end(cell, "stopped_early", {**kept, "steps": row["step"], "seconds": result["time_total_s"]})
            elif "outcome" in result:
                run.end(cell, result["outcome"], result["final"], result["reason"])

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            run.end(cells[trial.trial_id], *_failure(Path(trial.error_file).read_text(encoding="utf-8")))

    return Cells(), StopWithinArm(), Records()


def _failure(text: str) -> tuple[str, dict[str, Any], str]:
    """Outcome, empty final and reason from Ray's text of an error.

    An error raised by the trial comes with its traceback: infeasible. An actor or node that died does not: failed.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ("infeasible" if "Traceback" in text or 'File "' in text else "failed"), {}, lines[-1]


def _log_to(path: Path, library: str) -> None:
    """What a library wants to say goes to a log file of the study, not to the terminal."""
    logger = logging.getLogger(library)
    logger.handlers = [logging.FileHandler(path)]
    logger.propagate = False


def _slots(study: Study) -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1) // study.resources.cpus))


def run_ray(run: StudyRun, slots: int | None = None, trainable: Any = None) -> None:
    """Train every missing cell of a study with Ray Tune; returns when none is left or the run was interrupted.

    `slots`: trials side by side, as many as the cores hold when None. `trainable`: what trains a cell,
    `tune.trial.CellTrainable` when None (a simulated one measures everything else).
    """
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    import ray
    from ray import tune as ray_tune

    if trainable is None:
        from tune.trial import CellTrainable as trainable

    logs = run.folder / "logs"
    logs.mkdir(exist_ok=True)
    _log_to(logs / "ray.log", "ray")
    cpus = slots * run.study.resources.cpus if slots else None
    ours = not ray.is_initialized()
    if ours:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=True,
        )
    try:
        run.slots = slots or _slots(run.study)
        search, scheduler, ends = _tune_parts(run)
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(trainable, {"cpu": run.study.resources.cpus}),
            tune_config=ray_tune.TuneConfig(
                search_alg=search,
                scheduler=scheduler,
                num_samples=-1,
                reuse_actors=True,
                max_concurrent_trials=run.slots,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=ray_tune.RunConfig(
                name="ray",
                storage_path=str(logs.resolve()),
                verbose=0,
                callbacks=[ends],
                log_to_file=False,
                checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        tuner.fit()
    finally:
        if ours:
            ray.shutdown()


# --- a study, from its file to its tables ----------------------------------------------------------------------------


EXTENDABLE = ("confirm.seeds",)


def check_folder(study: Study, folder: Path) -> None:
    """Refuse a folder that belongs to another configuration; more confirm seeds than before extend a study."""
    recorded = folder / "study.yaml"
    if not recorded.exists():
        if folder.exists() and any(folder.iterdir()):
            raise StudyError(f"{folder}: is not empty and holds no study; choose another name or --output")
        return
    before = parse(recorded.read_text(encoding="utf-8"), recorded)
    if before.digest("tracking", *EXTENDABLE) != study.digest("tracking", *EXTENDABLE):
        changed = ", ".join(_differences(before.model_dump(), study.model_dump()))
        raise StudyError(f"{folder}: belongs to another configuration; changed: {changed}; give the study another name")
    if study.confirm.seeds < before.confirm.seeds:
        raise StudyError(
            f"{folder}: confirm.seeds was {before.confirm.seeds} and is now {study.confirm.seeds}; "
            "seeds can be added to a study, not taken away"
        )


def _differences(before: Any, now: Any, where: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [
            line for key in keys for line in _differences(before.get(key), now.get(key), f"{where}.{key}".strip("."))
        ]
    return [] if before == now or where == "tracking" else [f"{where} ({before} -> {now})"]


def packed_corpus(study: Study, output: Path, base: Path) -> Path:
    """The study's packed corpus, from the cache `PAGATING_CACHE` (default: .cache in the folder of studies)."""
    from pagating.corpus import prepare

    cache = Path(os.environ.get("PAGATING_CACHE") or output / ".cache").resolve()
    source = study.corpus.model_dump(exclude_none=True)
    return prepare(source, study.tokenizer.model_dump(), study.model.n_ctx, cache, base)


def sweep(
    study: Study,
    base: Path,
    output: Path,
    *,
    slots: int | None = None,
    tracking_uri: str | None = None,
    listen: Callable[[Progress], None] | None = None,
    trainable: Any = None,
) -> StudyRun:
    """Run a study, or what is missing of it, and write its tables. `base`: folder that `files:` patterns start from.

    Raises StudyError, CorpusError or LedgerError before anything is written that would belong to a study.
    """
    folder = output / study.name
    check_folder(study, folder)
    corpus = packed_corpus(study, output, base)
    folder.mkdir(parents=True, exist_ok=True)
    run = StudyRun(study, folder, corpus, listen)
    (folder / "study.yaml").write_text(dump(study), encoding="utf-8")
    try:
        if run.missing:
            if tracking_uri:
                from tune.tracking import Tracker

                run.tracker = Tracker(tracking_uri, study, folder, corpus)
            run_ray(run, slots, trainable)
    finally:
        run.ledger.close()
        if run.ledger.events:
            ledgers.write_tables(study.name, run.ledger.events, folder)
        if run.slots:
            write_provenance(folder, run.ledger.events, run.slots)
        if run.tracker:
            run.tracker.close()
    return run
