"""Runs a study, from its file to its tables: folder, corpus, ledger, Ray and tracking put together."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from analysis.io.write import write_whole
from tune.backend.ray_backend import run_ray
from tune.backend.ray_start import started
from tune.errors import StudyError
from tune.run import tables
from tune.run.extend import check_folder
from tune.run.interrupt import Interruption
from tune.run.provenance import write_provenance
from tune.run.study_run import Progress, StudyRun
from tune.study.corpus import packed_corpus
from tune.study.files import dump
from tune.study.own_gates import check_gates, keep_gates
from tune.study.study import Study
from tune.study.weights import check_pretrained, find_pretrained, note


class _Ray:
    """The Ray of one sweep, started while the disk is looked at: counting parameters loads torch, seconds as well."""

    def __init__(
        self, study: Study, folder: Path, slots: int | None, address: str | None, warn: Any, trains: bool
    ) -> None:
        self._study, self._folder, self._slots, self.address, self._warn = study, folder, slots, address, warn
        self._trains = trains
        self._until = ExitStack()
        self._begun = False

    def begin(self, vocab_size: int, cells: int | None = None) -> None:
        """Start it, once. Raises StudyError where the disk has less room than `cells` (None: all) may take."""
        if not self._begun:
            self._begun = True
            look = functools.partial(self._check_space, vocab_size, cells)
            self._until.enter_context(started(self._slots, self._study, self.address, self._warn, look, self._trains))

    def end(self) -> None:
        """End what `begin` started."""
        self._until.close()

    def _check_space(self, vocab_size: int, cells: int | None) -> None:
        from tune.plan.space import check_space, disk_needed

        slots = self._slots or os.cpu_count() or 1
        check_space(self._folder, disk_needed(self._study, slots, vocab_size=vocab_size, cells=cells))


def sweep(
    study: Study,
    base: Path,
    output: Path,
    *,
    slots: int | None = None,
    tracking_uri: str | None = None,
    listen: Callable[[Progress], None] | None = None,
    trainable: Any = None,
    interruption: Interruption | None = None,
    warn: Callable[[str], None] | None = None,
    address: str | None = None,
    watch: Callable[[StudyRun], AbstractContextManager[None]] | None = None,
) -> StudyRun:
    """Run a study, or what is missing of it, and write its tables. `base`: where paths in the study file start.

    `address`: of a Ray cluster, the study's own where it is None. `watch`: shows the run, entered when cells are to be
    trained.

    Raises StudyError, CorpusError or LedgerError before anything is written that would belong to a study; StudyStopped
    or OSError when the study cannot go on, all that has ended being kept.
    """
    folder = output / study.name
    there = next(path for path in (output.resolve(), *output.resolve().parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise StudyError(f"{there}: cannot be written (read-only, or not yours); give another --output")
    check_folder(study, folder)
    check_gates(study, base, folder)
    find_pretrained(study, base)  # before the corpus is packed, which may take minutes
    weights: dict[str, str] | None = None
    ray = _Ray(study, folder, slots, address or study.address, warn or (lambda line: None), trainable is None)

    def check(meta: Mapping[str, Any]) -> None:
        nonlocal weights
        weights = check_pretrained(study, base, folder, meta["vocab_size"])
        if not (folder / "ledger.jsonl").exists():
            ray.begin(meta["vocab_size"])

    try:
        corpus = packed_corpus(study, output, base, check)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "study.yaml").exists():
            write_whole(folder / "study.yaml", dump(study))  # first: a folder without it is not taken for a study
        keep_gates(study, base, folder)
        note(weights, folder)
        run = StudyRun(study, folder, corpus, listen, warn)
        with watch(run) if watch and run.missing else nullcontext():
            _train(run, ray, slots, trainable, interruption, tracking_uri)
    finally:
        ray.end()
    if run.ledger.events:
        tables.write_tables(study.name, run.ledger.events, folder)
    if run.slots:
        write_provenance(folder, run.ledger.events, run.slots)
    return run


def _train(
    run: StudyRun,
    ray: _Ray,
    slots: int | None,
    trainable: Any,
    interruption: Interruption | None,
    tracking_uri: str | None,
) -> None:
    """Train what is missing, tell MLflow, and leave the ledger closed, however it ends."""
    from pagating.data.corpus import read_meta

    try:
        write_whole(run.folder / "study.yaml", dump(run.study))
        if tracking_uri:
            run.tracker = _tracker(run, tracking_uri)
        if run.missing:
            ray.begin(read_meta(run.corpus)["vocab_size"], run.stages.remaining())
            try:
                run_ray(run, slots, trainable, interruption, ray.address)
            finally:
                ray.end()
        if run.stages.finished:
            run.warn_of_missing_models()
            if not run.study.keep.checkpoints:
                shutil.rmtree(run.all_checkpoints, ignore_errors=True)
    finally:
        run.heart.stop()
        run.ledger.close()
        if run.tracker:
            run.tracker.close(
                run.records.values(),
                finished=run.stages.finished,
                patience=3.0 if run.stopping else 60.0,
                lags=lambda cells: run.warn(
                    f"MLflow lags behind by {cells} cells and is waited for; Ctrl-C leaves them to `pagating sync`"
                ),
            )


def _tracker(run: StudyRun, uri: str) -> Any:
    """Who writes to MLflow; nobody where the study is finished and MLflow is known to have all of it."""
    from tune.tracking.tracker import Tracker, is_marked

    return Tracker(uri, run.study, run.folder, run.corpus) if run.missing or not is_marked(run.folder, uri) else None
