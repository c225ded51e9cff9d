"""Tests of the subject that trains the user's own function, each trial in a fresh process."""

import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.own_trainings import FUNCTION, own_study
from tests.tune.helpers import trained_to_the_end
from tune.errors import StudyError
from tune.study.cell import Cell
from tune.subject.function import Function
from tune.subject.own_worker import OwnTrial
from tune.subject.sources import draft
from tune.subject.subject import Job
from tune.subject.training import Training

REPORT = "trial.report(step, val_loss=loss)"
HEAD = "import os, sys, time\n\n\ndef train(trial):\n    trial.shift, trial.lr\n    "


def trained(folder: Path, function: str = FUNCTION, stage: str = "search", seed: int = 1, **changes):
    """Train one cell of the arm shifted; return the last result of `Training.advance`, and the rows before it."""
    study = own_study(folder, function, **changes)
    (folder / "out").mkdir(exist_ok=True)
    subject = Function(study, draft(study, folder, folder / "out").write())
    cell = Cell(stage, "shifted", 0, seed, {"lr": 0.1}, "k")
    job = Job("a", subject.trial(cell), subject.train, str(folder / "out" / "checkpoints"), 40)
    return trained_to_the_end(job)


def test_a_trial_reports_and_returns(tmp_path):
    result, rows = trained(tmp_path, stage="confirm")
    assert result["outcome"] == "completed"
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert result["final"]["val_nll"] == rows[-1]["val_nll"]
    assert result["final"]["test_nll"] == pytest.approx(rows[-1]["val_nll"] + 0.01)
    assert result["final"]["steps"] == result["final"]["tokens"] == 40
    assert 1 < result["final"]["peak_rss_mb"] < 200  # of a process without libraries
    again, _ = trained(tmp_path, stage="confirm")
    other, _ = trained(tmp_path, stage="confirm", seed=2)
    assert again["final"]["test_nll"] == result["final"]["test_nll"] != other["final"]["test_nll"]
    assert "test_nll" not in trained(tmp_path)[0]["final"]


def test_a_metric_of_which_more_is_better_is_a_loss_in_the_ledger(tmp_path):
    lower, _ = trained(tmp_path / "a", stage="confirm")
    higher, _ = trained(tmp_path / "b", stage="confirm", metric={"goal": "maximize"})
    assert higher["final"]["val_nll"] == -lower["final"]["val_nll"]
    assert higher["final"]["test_nll"] == -lower["final"]["test_nll"]


SABOTAGE = {
    "test metric in a report": (FUNCTION.replace(REPORT, "trial.report(step, val_loss=loss, test_loss=loss)"), "failed",
        "trial.report got test_loss; the test metric is read once"),
    "test metric returned in the search": (FUNCTION.replace(" if trial.test else {}", ""), "failed",
        "returned test_loss although trial.test is false"),
    "not a number": (FUNCTION.replace(REPORT, "trial.report(step, val_loss=float('nan'))"), "infeasible",
        "val_loss is nan at step 10"),
    "infeasible": (HEAD + "raise trial.Infeasible('too wide')", "infeasible", "too wide"),
    "exception": (FUNCTION.replace(REPORT, "{}['key']"), "failed", "KeyError: 'key' (mine.py, line 13)"),
    "out of memory": (HEAD + "bytearray(1 << 60)", "infeasible", "MemoryError"),
    "too short": (FUNCTION.replace("trial.budget + 1", "trial.budget - 5"), "failed",
        "the last report was at step 30 of 40 steps"),
    "too long": (FUNCTION.replace("trial.budget + 1", "trial.budget + 11"), "failed",
        "got step 50 after 40; a step is a whole number above the last one, up to the budget of 40 steps"),
    "arm's setting not read": (FUNCTION.replace("trial.shift", "0.1"), "failed",
        "arms.shifted: the function never reads trial.shift"),
    "wrong name": (FUNCTION.replace("trial.shift", "trial.shfit"), "failed",
        "arm shifted has no trial.shfit; did you mean trial.shift?"),
    "no metric": (FUNCTION.replace(REPORT, "trial.report(step, loss=loss)"), "failed",
        "trial.report got loss; the study needs val_loss"),
    "no number": (FUNCTION.replace(REPORT, "trial.report(step, val_loss='low')"), "failed",
        "val_loss is 'low', which is no number"),
    "wrong return": (FUNCTION.replace("{}", "3"), "failed", "the function returned int"),
    "missing import": ("import nowhere\n" + FUNCTION, "failed", "No module named 'nowhere' (mine.py, line 1)"),
    "killed": (HEAD + "os.kill(os.getpid(), 9)", "failed", "by signal 9 (the system sends it when memory is short"),
    "exit 0": (HEAD + "print('bye', flush=True) or os._exit(0)", "failed",
        "its process ended with exit code 0; its last line: bye"),
    "exit by sys.exit": (HEAD + "sys.exit(3)", "failed", "SystemExit: 3"),
    "hang": (HEAD + "time.sleep(60)", "failed", "no report for 1 s (resources.stall_timeout)"),
}  # fmt: skip


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_trial_that_breaks_the_protocol_is_named_in_a_line(tmp_path, name):
    function, outcome, said = SABOTAGE[name]
    began = time.monotonic()
    result, _ = trained(tmp_path, function, resources={"stall_timeout": 1.0} if name == "hang" else {})
    assert (result["outcome"], "\n" in result["reason"]) == (outcome, False), result["reason"]
    assert said in result["reason"]
    assert time.monotonic() - began < 30


def test_a_stopped_trial_leaves_no_process(tmp_path):
    told = tmp_path / "pid"
    function = FUNCTION.replace(
        "    draw =", f"    import os; open({str(told)!r}, 'w').write(str(os.getpid()))\n    draw ="
    )
    study = own_study(tmp_path, function)
    (tmp_path / "out").mkdir()
    subject = Function(study, draft(study, tmp_path, tmp_path / "out").write())
    job = Job("a", subject.trial(Cell("search", "plain", 0, 1, {"lr": 0.1}, "k")), subject.train, None, 40)
    training = Training(job)
    while not training.advance()["row"]:
        pass
    os.kill(int(told.read_text()), 0)  # it waits
    training.replaced()
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


def test_streams_follow_from_seed_and_name_alone():
    order = {"arm": "a", "seed": 7, "budget": 1, "test": False, "folder": ".", "values": {}, "metric": "m"}
    one, two = (OwnTrial({**order, "test_metric": "t", "unit": "steps"}, print, print) for _ in range(2))
    one.rng("init").normal(size=1000)  # an arm with more weights
    drawn = one.rng("data").integers(0, 1 << 30, 4)
    assert np.array_equal(drawn, two.rng("data").integers(0, 1 << 30, 4))
    assert not np.array_equal(drawn, two.rng("init").integers(0, 1 << 30, 4))


def test_files_are_copied_with_what_they_import_and_may_not_change(tmp_path):
    study = own_study(tmp_path)
    (tmp_path / "unused.py").write_text("1 / 0")
    (tmp_path / "out").mkdir()
    sources = draft(study, tmp_path, tmp_path / "out").write()
    assert sorted(sources.files) == ["mine.py", "noise.py"]
    (tmp_path / "noise.py").write_text("SIZE = 9.0\n")
    with pytest.raises(StudyError, match=r"noise\.py has changed since the study began"):
        draft(study, tmp_path, tmp_path / "out")
    with pytest.raises(StudyError, match=r"is not the file that the study was begun with"):
        sources.check_begun({"runs": "train", "code": {**sources.files, "noise.py": "0"}})
    (tmp_path / "mine.py").unlink()  # then the copies are all that there is
    assert draft(study, tmp_path, tmp_path / "out").write().files == sources.files


def test_a_function_that_is_not_there_is_named(tmp_path):
    for given, said in (("mine.py:trian", "has no function trian"), ("my.py:train", "my.py: no such file")):
        study = own_study(tmp_path, trial=given)
        with pytest.raises(StudyError, match=said):
            draft(study, tmp_path, tmp_path / "out")
    study = own_study(tmp_path, function="def train(:\n")
    with pytest.raises(StudyError, match=r"mine\.py, line 1: "):
        draft(study, tmp_path, tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the memory of another process")
def test_a_process_that_is_killed_says_how_much_memory_it_had(tmp_path):
    grows = HEAD + "kept = b'x' * (200 << 20); import time; time.sleep(1.6); os.kill(os.getpid(), 9)"
    result, _ = trained(tmp_path, grows)
    megabytes = re.search(r"when memory is short; it had (\d+) MB\)", result["reason"])
    assert megabytes
    assert 200 < int(megabytes[1]) < 300
