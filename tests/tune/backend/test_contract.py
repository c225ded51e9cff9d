"""Contract tests that run over every backend, subject and tracker."""

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import ray

from tests.own_trainings import FUNCTION, own_study
from tests.studies import TINY, changed, study_of
from tests.tune.helpers import Caught, meta_of
from tests.tune.steps import Broken, bowl
from tune.backend.backend import Backend
from tune.backend.inline import Inline
from tune.backend.ray_adapters import Cells, Records, StopWithinArm
from tune.backend.ray_backend import RayBackend
from tune.backend.ray_start import QUIET
from tune.errors import StudyError, StudyStopped
from tune.run import ledger, tables
from tune.run.ledger import MemoryLedger
from tune.run.study_run import StudyRun
from tune.run.tracker import NoTracker
from tune.study.cell import Cell, Record
from tune.study.inputs import packed_corpus
from tune.subject.function import release
from tune.subject.gpt2 import Gpt2
from tune.subject.known import Known
from tune.subject.short import subject_of
from tune.subject.sources import draft
from tune.tracking.tracker import MlflowTracker

STUDY = changed(
    TINY,
    search={"trials_per_arm": 4},
    arms={"searched": {"gate": "sigmoid", "alpha": {"search": {"uniform": [0.0, 2.0]}}}},
)
CLOCK = ("time", "crc", "seconds", "tokens_per_second", "peak_rss_mb", "memory_growth_mb")
BACKENDS = {"inline": Inline, "ray": lambda **given: RayBackend(1, **given)}


def study(**changes):
    return study_of(STUDY, "contract", **changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    base = tmp_path_factory.mktemp("text")
    (base / "text.txt").write_text("".join(f"{i * 7919 % 1000} the quick brown fox jumps\n" for i in range(800)))
    return packed_corpus(study(corpus={"files": {"train": "text.txt"}}), base, base)


@pytest.fixture(scope="module")
def one_ray():
    os.environ |= {name: value for name, value in QUIET.items() if name not in os.environ}
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def without_clock(value):
    if isinstance(value, dict):
        return {key: without_clock(kept) for key, kept in value.items() if key not in CLOCK}
    return list(map(without_clock, value)) if isinstance(value, list | tuple) else value


def trained(backend: Backend, subject, folder, given, **options):
    """Train a study with a backend; return the closed run."""
    folder.mkdir()
    run = StudyRun(given, folder, subject(given, folder), **options)
    backend.start(given, lambda: None)
    try:
        backend.train(run)
    finally:
        backend.stop()
        run.close()
    return run


# --- backends --------------------------------------------------------------------------------------------------------


def test_both_backends_write_the_same_ledger(one_ray, corpus, tmp_path):
    """Check the order of the events and the bits of every loss. Only times may differ."""
    found, given = {}, study(arms={"linear-floor": None})
    for name, make in BACKENDS.items():
        subject = lambda study, folder: Gpt2.at(study, folder, corpus)  # noqa: E731
        run = trained(make(), subject, tmp_path / name, given)
        assert run.stages.finished
        assert run.slots == 1
        found[name] = without_clock(ledger.read(tmp_path / name / "ledger.jsonl"))
        assert not (tmp_path / name / "heartbeat.json").exists()
    assert found["inline"] == found["ray"]
    outcomes = {event["outcome"] for event in found["inline"] if event["event"] == "ended"}
    assert outcomes == {"completed", "stopped_early"}


@pytest.mark.slow
def test_both_backends_write_the_same_ledger_of_known_losses(one_ray, tmp_path):
    found = {}
    for name, make in BACKENDS.items():
        trained(make(), lambda given, folder: Known(given, bowl), tmp_path / name, study())
        found[name] = without_clock(ledger.read(tmp_path / name / "ledger.jsonl"))
    assert found["inline"] == found["ray"]
    ends = [event for event in found["inline"] if event["event"] == "ended"]
    (diverged,) = [event for event in ends if event["outcome"] == "infeasible"]
    assert diverged["cell"] == "search/searched/0/1"
    assert diverged["reason"] == "the loss is inf at step 2"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_start_that_is_refused_leaves_nothing_started(name, monkeypatch):
    ended = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)  # no Ray is started for this
    backend = BACKENDS[name]()

    def refuse():
        ended.append(1)
        raise StudyError("the disk is full")

    with pytest.raises(StudyError, match="the disk is full"):
        backend.start(study(), refuse)
    backend.stop()
    assert ended == [1]


@pytest.mark.parametrize("name", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_an_error_of_a_trial_is_an_infeasible_row_with_its_last_line(one_ray, name, tmp_path):
    given = study(stages=["search"], search={"trials_per_arm": 1})
    run = trained(BACKENDS[name](), lambda given, folder: Broken(given, bowl), tmp_path / name, given)
    reasons = {record.cell.arm: (record.outcome, record.reason) for record in run.records.values()}
    assert reasons["linear-floor"] == ("infeasible", "ZeroDivisionError: an own gate divided by zero")
    assert reasons["searched"] == ("infeasible", "the loss is nan at step 1")
    assert reasons["gelu"] == ("completed", None)
    assert sum(event["event"] == "ended" for event in run.ledger.events) == 3  # none was tried again


@pytest.mark.parametrize("name", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_ledger_that_is_removed_ends_the_study_with_its_reason(one_ray, name, tmp_path):
    folder = tmp_path / name

    def removing(progress):
        (folder / "ledger.jsonl").unlink(missing_ok=True)

    with pytest.raises(StudyStopped, match=r"the study stopped: .*ledger\.jsonl: was removed or moved"):
        trained(BACKENDS[name](), lambda given, folder: Known(given, bowl), folder, study(), listen=removing)


def broken_after(calls):
    """Return a function that raises an error at a call, counted from 1, and before that does nothing."""
    seen = []

    def call(*given, **named):
        seen.append(given)
        if len(seen) >= calls:
            raise KeyError("a bug")

    return call


class BrokenTracker(NoTracker):
    """Tracker one of whose methods has a bug."""

    def __init__(self, method):
        setattr(self, method, broken_after(3))


HOOKS = {
    "listen": {"listen": broken_after(2)},
    "tracker.started": {"tracker": BrokenTracker("started")},
    "tracker.reported": {"tracker": BrokenTracker("reported")},
    "tracker.ended": {"tracker": BrokenTracker("ended")},
    "check_space": {"check_space": broken_after(1)},
}
METHODS = ["next_cell", "start", "cell_heartbeat", "report", "should_stop", "end", "heartbeat"]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *(("inline", place) for place in (*HOOKS, *METHODS)),
        ("ray", "report"),
        *(pytest.param("ray", place, marks=pytest.mark.slow) for place in (*HOOKS, *METHODS) if place != "report"),
    ],
)
def test_an_error_in_any_callback_ends_the_study_with_its_reason(one_ray, name, place, tmp_path, monkeypatch):
    given = study(arms={"linear-floor": None}, search={"trials_per_arm": 2})
    if place in METHODS:
        own, fail = getattr(StudyRun, place), broken_after(3)

        def method(run, *args, **named):
            fail()
            return own(run, *args, **named)

        monkeypatch.setattr(StudyRun, place, method)
    subject = lambda given, folder: Known(given, bowl)  # noqa: E731
    with pytest.raises(StudyStopped, match=r"^the study stopped: KeyError: 'a bug'; see .*logs$"):
        trained(BACKENDS[name](), subject, tmp_path / name, given, **copy.deepcopy(HOOKS.get(place, {})))
    monkeypatch.undo()
    whole = StudyRun(given, tmp_path / name, Known(given, bowl))  # the ledger is not damaged
    Inline().train(whole)
    whole.close()
    assert whole.stages.finished


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["_add", "_decide", "choose_trial_to_run", "_step", "_watch", "_take", "_end", "_forget", "suggest"]
)
def test_an_error_in_any_of_rays_adapters_ends_the_study_with_its_reason(one_ray, place, tmp_path, monkeypatch):
    kind = next(one for one in (StopWithinArm, Records, Cells) if place in vars(one))
    monkeypatch.setattr(kind, place, broken_after(2 if place != "_step" else 20))
    given = study(arms={"linear-floor": None}, search={"trials_per_arm": 2})
    with pytest.raises(StudyStopped, match=r"KeyError.*a bug|stopped with an error: .*'a bug'"):
        trained(RayBackend(1), lambda given, folder: Known(given, bowl), tmp_path / "broken", given)


@pytest.mark.parametrize("name", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_what_json_cannot_hold_is_recorded_as_null_or_text(one_ray, name, tmp_path):
    class Odd(Known):
        def train(self, trial, checkpoints, model):
            for done, row in super().train(trial, checkpoints, model):
                row["grad_norm"], row["note"] = np.float32(math.inf), Path("a")
                if "final" in row:
                    row["final"] |= {"val_ppl": math.inf, "seconds": np.float64(0.5), "tokens": np.int64(7)}
                yield done, row

    given = study(stages=["search"], search={"trials_per_arm": 1})
    run = trained(BACKENDS[name](), lambda given, folder: Odd(given, lambda cell, share: 900.0), tmp_path / name, given)
    assert run.stages.finished
    for record in run.records.values():
        assert record.final["val_ppl"] is None
        assert record.final["val_nll"] == 900.0
        assert (record.final["seconds"], record.final["tokens"]) == (0.5, 7)
        assert (record.curve[-1]["grad_norm"], record.curve[-1]["note"]) == (None, "a")
    read = ledger.records(ledger.read(tmp_path / name / "ledger.jsonl"))
    assert {key: record.final for key, record in read.items()} == {
        key: record.final for key, record in run.records.items()
    }
    trials, curves = tables.tables("x", run.ledger.events)
    assert trials["val_ppl"].isna().all()
    assert curves["grad_norm"].isna().all()


@pytest.mark.parametrize("name", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_an_interrupted_study_goes_on_to_the_same_result(one_ray, name, tmp_path):
    subject = lambda given, folder: Known(given, bowl)  # noqa: E731
    interruption, given = Caught(after=3), study(arms={"searched": None}, search={"trials_per_arm": 2})
    whole = trained(Inline(), subject, tmp_path / "whole", given)
    run = trained(
        BACKENDS[name](), subject, tmp_path / name, given, listen=interruption.ended, interruption=interruption
    )
    assert not run.stages.finished
    again = StudyRun(given, tmp_path / name, Known(given, bowl))
    backend = BACKENDS[name]()
    backend.train(again)
    again.close()
    assert {k: (r.outcome, without_clock(r.final)) for k, r in again.records.items()} == {
        k: (r.outcome, without_clock(r.final)) for k, r in whole.records.items()
    }


# --- subjects --------------------------------------------------------------------------------------------------------


COMMAND = """
import sys
lr, shift, seed, steps, test = map(float, sys.argv[1:])
for step in range(2, int(steps) + 1, 2):
    loss = 2 + lr - shift + (seed * 7919 % 11) / 100 + 1 / step
    print(f"METRIC val_loss={loss} step={step}", flush=True)
if test:
    print(f"METRIC test_loss={loss + 0.01}")
"""


def own(folder, corpus, **changes):
    """Return the subject of a user's training of 20 steps, and its baseline."""
    (folder / "train.py").write_text(COMMAND)
    given = own_study(
        folder, FUNCTION.replace("range(10", "range(2").replace(", 10)", ", 2)"), budget={"steps": 20}, **changes
    )
    return subject_of(given, draft(given, folder, folder / "out").write()), "plain"


SUBJECTS = {
    "gpt2": lambda folder, corpus: (Gpt2.at(study(), folder, corpus), "gelu"),
    "known": lambda folder, corpus: (Known(study(), bowl), "gelu"),
    "function": own,
    "reused function": lambda folder, corpus: own(folder, corpus, reuse=True),
    "command": lambda folder, corpus: own(
        folder, corpus, trial={"command": "python train.py {lr} {shift} {seed} {budget} {test}"}
    ),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_subject_repeats_its_rows_names_itself_and_ends_with_a_result(name, corpus, tmp_path):
    (tmp_path / "out").mkdir()
    subject, arm = SUBJECTS[name](tmp_path, corpus)
    identity = subject.identity()
    assert json.loads(json.dumps(identity)) == identity
    subject.check_begun({"event": "study", **identity})
    for stage, seed in (("calibrate", 11), ("confirm", 101)):
        cell = Cell(stage, arm, 0, seed, {"lr": 3e-3}, "key")
        runs = [[step for step in subject.train(subject.trial(cell), None, None) if step] for _ in range(2)]
        assert without_clock(runs[0]) == without_clock(runs[1])
        made = [step for step, _ in runs[0]]
        assert made == sorted(made)
        rows = [row for _, row in runs[0] if row]
        assert rows[-1]["step"] == made[-1] == 20
        assert [("final" in row) for row in rows] == [False] * (len(rows) - 1) + [True]
        assert ("test_nll" in rows[-1]["final"]) == (stage == "confirm")
        assert {"step", "tokens", "val_nll", "tokens_per_second", "alpha"} <= rows[0].keys()
        assert ("train_nll" in rows[0]) == (name in ("gpt2", "known"))
    release()


def test_a_study_that_was_begun_on_another_corpus_is_refused(corpus, tmp_path):
    given = study()
    run = StudyRun(given, tmp_path, Gpt2.at(given, tmp_path, corpus))
    run.close()
    with pytest.raises(StudyError, match="the study was begun on corpus 0123"):
        Gpt2.at(given, tmp_path, corpus).check_begun({"corpus": "0123"})


def test_known_losses_need_no_disk():
    given = study()
    run = StudyRun(given, None, Known(given, bowl), ledger=MemoryLedger())
    Inline().train(run)
    assert run.stages.finished
    with pytest.raises(StudyError, match="writes nothing to disk"):
        _ = run.folder


# --- trackers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "mlflow"])
def test_a_tracker_takes_a_study_and_owes_nothing_at_its_end(name, place):
    folder, packed, uri = place
    given = study()
    tracker = NoTracker() if name == "none" else MlflowTracker(uri, given, folder, meta_of(packed))
    record = Record(Cell("confirm", "gelu", 0, 101, {"lr": 1e-3}, "key"), started=1.0)
    tracker.started(record)
    row = {"step": 4, "tokens": 40, "val_nll": 3.5, "train_nll": 3.4, "lr": 1e-3, "grad_norm": 1.0, "alpha": []}
    record.curve, record.times = [row | {"tokens_per_second": 1.0}], [2.0]
    tracker.reported(record, record.curve[-1])
    record.outcome, record.final, record.ended = "completed", {"val_nll": 3.5}, 3.0
    tracker.ended(record)
    said = []
    tracker.close([record], finished=True, patience=60.0, warn=said.append)
    assert said == []
