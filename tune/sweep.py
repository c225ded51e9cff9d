"""Run a study, from its file to its tables. Only this module combines inputs, ledger, backend and tracker."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from analysis.io.write import write_whole
from tune.backend.backend import Backend
from tune.errors import StudyError
from tune.plan.probe import decide_precision
from tune.plan.space import check_space, disk_needed
from tune.run import tables
from tune.run.extend import check_folder, own_corpus
from tune.run.interrupt import Interruption
from tune.run.kept.measured import write_measured
from tune.run.provenance import write_provenance
from tune.run.study_run import CellEnded, StudyRun
from tune.run.tracker import NoTracker, Tracker
from tune.study.files import FILE, LEDGER, dump
from tune.study.inputs import DraftInputs, Inputs, drafted, relocated
from tune.study.own_gates import doubtful
from tune.study.own_study import OwnStudy
from tune.study.sections import AUTO
from tune.study.sizes import short_searches
from tune.study.study import Study
from tune.subject.check import NOT_CHECKED, recorded
from tune.subject.function import release
from tune.subject.gpt2 import Gpt2
from tune.subject.short import subject_of
from tune.subject.sources import DraftSources, Sources, draft
from tune.subject.subject import Subject
from tune.tracking.identity import study_id

OWNER = "study-id"  # file that names the study in its part of a storage


def sweep(
    study: Study,
    base: str | Path,
    output: str | Path,
    backend: Backend | None = None,
    *,
    tracking_uri: str | None = None,
    listen: Callable[[CellEnded], None] | None = None,
    interruption: Interruption | None = None,
    warn: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
    watch: Callable[[StudyRun], AbstractContextManager[None]] | None = None,
) -> StudyRun:
    """Train the missing cells of a study and write its tables.

    Args:
        study: The study.
        base: Folder of the study file. Relative paths in the file start there.
        output: Folder of studies.
        backend: Backend that runs the cells. None means Ray, on the study's cluster or else on this machine.
        tracking_uri: MLflow tracking URI. None logs nothing.
        listen: Called with each cell that ended.
        interruption: Handler of signals.
        warn: Called with each warning for the user, one line each.
        say: Called with a line on what is decided, and before a wait.
        watch: Context manager that displays the run. It is entered only if cells are missing.

    Returns:
        The closed run. `tracker.finish` can still be called on it.

    Raises:
        StudyError, CorpusError, LedgerError: The study cannot start or continue. Nothing of a new study is written.
        StudyStopped, OSError: The study stopped early. The cells that have ended are kept.
    """
    base, output = Path(base), Path(output)
    folder = output / study.name
    there = next(path for path in (output.resolve(), *output.resolve().parents) if path.exists())
    if not there.is_dir():
        raise StudyError(f"{there}: is a file; give a folder as --output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StudyError(f"{there}: cannot be written (read-only, or owned by another user); give another --output")
    study = check_folder(study, folder, base)
    _check_storage(study, folder)
    backend = backend or _ray(study, warn)
    begun = (folder / LEDGER).exists()
    if not begun:  # with a ledger, it is not known yet if any cell is missing
        backend.check(study)
    try:
        if warn:
            for line in [*doubtful(study, base, folder), *short_searches(study)]:
                warn(line)
        with _drafted(study, base, folder, output) as found:
            decided = None
            if study.fixed.precision == AUTO:
                decided = decide_precision(study, base, found.vocab_size, say)
                study = study.with_precision(decided.chosen)
                if say:
                    say(str(decided))
            resolved = dump(relocated(study, base, folder))
            space = _space(study, folder, backend.slots, found.vocab_size)
            if not begun:
                backend.start(study, lambda: space(None))
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / FILE).exists():
                write_whole(folder / FILE, resolved)  # first: it marks the folder as a study
            inputs = found.write()
        run = StudyRun(
            study,
            folder,
            _subject(study, inputs),
            listen=listen,
            warn=warn,
            interruption=interruption,
            check_space=space,
            decided={"precision": decided.as_dict()} if decided else {},
        )
        with closing(run):
            _check_storage(study, folder, claim=True)
            if warn and not begun and (line := _of_check(folder, run.subject.identity())):
                warn(line)
            if run.missing:  # a report of the unfinished study reads it
                write_provenance(folder, study, run.ledger.events, backend.slots)
            with watch(run) if watch and run.missing else nullcontext():
                _train(run, backend, inputs, resolved, tracking_uri, lambda: space(run.stages.remaining()))
    finally:
        backend.stop()
        release()
    if run.ledger.events:
        tables.write_tables(study.name, run.ledger.events, folder, study)
        write_measured(study, folder, run.records.values())
    if run.slots:
        write_provenance(folder, study, run.ledger.events, run.slots)
    return run


def _of_check(folder: Path, identity: Mapping[str, Any]) -> str:
    """Return a warning if the user's own training was not checked, or was refused; else ""."""
    if "code" not in identity:
        return ""
    found = recorded(folder, identity)
    if refused := found.get("refused"):
        return f"`pagating check` refused this training: {refused[0]}; the study runs, and its report says so"
    return "not checked: `pagating check` takes a few short trials, and the report then states what it found" * (
        found["grade"] == NOT_CHECKED
    )


def _drafted(
    study: Study, base: Path, folder: Path, output: Path
) -> AbstractContextManager[DraftInputs | DraftSources]:
    """Find and check what the study trains on, or the user's own training; write nothing."""
    if isinstance(study, OwnStudy):
        return nullcontext(draft(study, base, folder))
    return drafted(study, base, folder, output, own_corpus(base, folder))


def _subject(study: Study, inputs: Inputs | Sources) -> Subject:
    """Return what the arms train."""
    if isinstance(inputs, Inputs):
        return Gpt2(study, inputs)
    assert isinstance(study, OwnStudy)
    return subject_of(study, inputs)


def _ray(study: Study, warn: Callable[[str], None] | None) -> Backend:
    from tune.backend.ray_backend import RayBackend  # a machine without Ray has another backend

    return RayBackend(address=study.address, warn=warn)


def _check_storage(study: Study, folder: Path, claim: bool = False) -> None:
    """Raise StudyError if the study's part of its storage is that of another study of the same name.

    Args:
        study: The study.
        folder: The study's folder.
        claim: Write the study's identity into that part.
    """
    if not study.storage or not os.path.isdir(study.storage):  # a driver outside the cluster may not see it
        return
    mark, ledger = Path(study.storage) / study.name / OWNER, folder / LEDGER
    mine = study_id(ledger) if ledger.is_file() else None
    if mark.is_file() and mark.read_text(encoding="utf-8") != mine:
        raise StudyError(
            f"storage '{study.storage}': {mark.parent} holds checkpoints and models of another study called "
            f"'{study.name}': give this one another name or storage, or remove that folder if the other one is gone"
        )
    if claim and mine and not mark.exists():
        mark.parent.mkdir(exist_ok=True)
        write_whole(mark, mine)


def _space(study: Study, folder: Path, slots: int, vocab_size: int) -> Callable[[int | None], None]:
    """Return a function that raises StudyError if the disk is too small for a number of cells (None: all cells)."""

    def check(cells: int | None) -> None:
        needed = partial(disk_needed, study, slots, vocab_size=vocab_size, cells=cells)
        check_space(folder, partial(needed, rough=True), needed)  # counting parameters loads torch

    return check


def _train(
    run: StudyRun,
    backend: Backend,
    inputs: Inputs | Sources,
    resolved: str,
    tracking_uri: str | None,
    check_space: Callable[[], None],
) -> None:
    """Train the missing cells, update the tracker, and always close the ledger.

    Args:
        run: The run.
        backend: Backend that runs the cells.
        inputs: Inputs of the study.
        resolved: Content of the study.yaml that is written into the study's folder.
        tracking_uri: MLflow tracking URI, or None.
        check_space: Raises StudyError if the disk is too small for the cells that are left.
    """
    try:
        write_whole(run.folder / FILE, resolved)
        run.tracker = _tracker(run, inputs, tracking_uri)
        if run.missing:
            backend.start(run.study, check_space)
            try:
                backend.train(run)
            finally:
                backend.stop()
        if run.stages.finished:
            for line in run.models.missing(run.records.values()):
                run.warn(line)
            if not run.study.keep.checkpoints:
                shutil.rmtree(run.all_checkpoints, ignore_errors=True)
    finally:
        run.close()
        run.tracker.close(
            run.records.values(), finished=run.stages.finished, patience=3.0 if run.stopping else 60.0, warn=run.warn
        )


def _tracker(run: StudyRun, inputs: Inputs | Sources, uri: str | None) -> Tracker:
    """Return the tracker. It is a `NoTracker` if the study is finished and the MLflow store already has all of it."""
    from tune.tracking.tracker import MlflowTracker, is_marked

    if uri is None or not (run.missing or not is_marked(run.folder, uri)):
        return NoTracker()
    return MlflowTracker(uri, run.study, run.folder, inputs.meta)
