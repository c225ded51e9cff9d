"""Tests of `pagating plan` and `pagating try` for the user's own training."""

import json
import sys

import pytest

from tests.own_trainings import FUNCTION, own_study
from tests.tune.helpers import typed
from tune.errors import StudyError, StudyStopped
from tune.plan import own
from tune.subject.short import ShortTrial

SLOW = FUNCTION.replace("    for step", "    import time; time.sleep(0.3)\n    for step").replace(
    "        trial.report", "        time.sleep(0.1)\n        trial.report"
)


def shorts(*reports, seconds, outcome="completed", final=None):
    """Return a trial with evaluations at these (step, seconds)."""
    rows = [{"step": step, "tokens_per_second": step / at, "val_nll": 1.0} for step, at in reports]
    return ShortTrial(outcome, "", rows, final or {}, 100, seconds)


def test_the_cost_of_a_trial_is_that_between_reports_and_that_of_its_start():
    found = own.cost(shorts((10, 3.0), (20, 4.0), (100, 12.0), seconds=12.5, final={"peak_rss_mb": 80.0}))
    assert (found.unit, found.fixed, found.peak_mb) == (pytest.approx(0.1), pytest.approx(2.5), 80.0)
    stopped = own.cost(shorts((10, 3.0), (30, 5.0), seconds=5.0, outcome="stopped"))
    assert (stopped.unit, stopped.fixed, stopped.peak_mb) == (pytest.approx(0.1), pytest.approx(2.0), None)
    only_at_its_end = own.cost(shorts((100, 7.9), seconds=8.0))
    assert (only_at_its_end.unit, only_at_its_end.fixed) == (pytest.approx(0.08), 0.0)
    with pytest.raises(StudyStopped, match=r"no report came within 600 s.* --hours-from 3600s"):
        own.cost(shorts(seconds=601.0, outcome="stopped"))


def test_a_plan_of_an_own_training_has_its_unit_and_its_measured_seconds(tmp_path, monkeypatch, capsys):
    own_study(tmp_path, SLOW, budget={"steps": None, "epochs": 40})
    config = tmp_path / "own.yaml"
    code, out, err = typed(monkeypatch, capsys, "plan", config, "--slots", 1, "--format", "json", "--noise", "1%")
    found = json.loads(out)
    assert code == 0
    assert "a trial of each of 3 arms runs here" in err
    assert found["total"]["cells"] == [3 * (2 + 3 + 4)] * 3
    by_arm = {arm: sum(row["tokens"][1] for row in found["work"] if row["arm"] == arm) for arm in found["speeds"]}
    assert by_arm == {"plain": 9 * 40, "shifted": 9 * 40, "short": 9 * 20}
    assert found["total"]["flops"] == [0, 0, 0]
    assert found["speeds"]["plain"] == pytest.approx(100, rel=0.2)  # 10 epochs in 0.1 s
    confirm = 4 * (2 * 0.7 + 0.5)
    assert confirm < found["seconds"]["confirm"][1] < confirm + 12 * 0.6
    assert found["names"] == {"budget": "epochs", "metric": "test_loss"}
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "mine.py", "noise.py", "own.yaml"
    ]  # fmt: skip


def test_hours_from_the_seconds_of_a_trial_need_no_training(tmp_path, monkeypatch, capsys):
    own_study(tmp_path, "raise ValueError('must not run')\ndef train(trial): pass\n")
    config = tmp_path / "own.yaml"
    code, out, _ = typed(monkeypatch, capsys, "plan", config, "--hours-from", "100s", "--slots", 1, "--noise", "1%")
    assert code == 0
    assert "confirm 16.7 min" in out.replace("\n", " ")  # 4 x (100 + 100 + 50) s
    assert "of the baseline's test_loss" in out
    assert [word for word in ("tokens", "FLOPs", "GPT", "published") if word in out] == []
    code, _, err = typed(monkeypatch, capsys, "plan", config, "--hours-from", "a100")
    assert (code, err.count("\n")) == (2, 1)
    assert "--hours-from a100: allowed: measure, or the seconds of a trial, such as 90s" in err
    (tmp_path / "mine.py").unlink()
    code, out, err = typed(monkeypatch, capsys, "plan", config, "--hours-from", "100s")
    assert (code, out) == (2, "")
    assert err == f"pagating: trial: mine.py: no such file in {tmp_path}\n"


def test_a_plan_of_a_training_that_fails_is_refused_with_its_reason(tmp_path, monkeypatch, capsys):
    own_study(tmp_path, FUNCTION.replace("- trial.shift +", "+ 1 / trial.shift +"))
    code, _, err = typed(monkeypatch, capsys, "plan", tmp_path / "own.yaml")
    assert code == 2
    assert "arms.plain: a trial is failed: ZeroDivisionError: float division by zero (mine.py, line" in err


def test_try_shows_the_metric_of_each_arm_and_fails_with_an_arm(tmp_path, monkeypatch, capsys):
    names = {"name": "val_score", "test": "test_score", "goal": "maximize"}
    function = FUNCTION.replace("val_loss=loss", "val_score=loss").replace("test_loss", "test_score")
    own_study(tmp_path, function, metric=names)
    config = tmp_path / "own.yaml"
    code, out, _ = typed(monkeypatch, capsys, "try", config, "--steps", 20)
    assert code == 0
    lines = {line.partition(":")[0]: line for line in out.splitlines()}
    assert list(lines) == ["plain", "shifted", "short"]
    assert lines["shifted"].startswith("shifted: shift=0.1; val_score 3.9")
    assert " -> 2.9" in lines["shifted"]
    assert "in 20 of 40 steps" in lines["shifted"]
    assert ("MiB at the peak" in lines["plain"]) == (sys.platform in ("linux", "darwin"))
    code, out, _ = typed(monkeypatch, capsys, "try", config)  # its reports come every 10 steps
    assert code == 0
    assert "in 10 of 40 steps" in out
    assert [line.partition(":")[0] for line in out.splitlines() if "as long as plain here" in line] == ["short"]
    code, out, _ = typed(monkeypatch, capsys, "try", config, "--steps", 15)
    assert code == 1
    assert "plain: failed: the last report was at step 10 of 15 steps" in out
    for word in (["--arm", "none"], ["--micro-batches", 2]):
        code, _, err = typed(monkeypatch, capsys, "try", config, *word)
        assert (code, err.count("\n")) == (2, 1)


def test_no_arm_of_that_name(tmp_path):
    with pytest.raises(StudyError, match=r"--arm none: own has the arms plain, shifted, short"):
        next(own.try_arms(own_study(tmp_path), tmp_path, None, ["none"]))


def test_a_plan_of_a_ladder_measures_each_size(tmp_path, monkeypatch, capsys):
    slow = FUNCTION.replace("        trial.report", "        time.sleep(0.02 * trial.width)\n        trial.report")
    sizes = [{"width": 1, "budget": 20}, {"width": 2, "budget": 20}, {"width": 8, "budget": 40}]
    own_study(tmp_path, "import time\n" + slow, scales=sizes)
    code, out, _ = typed(monkeypatch, capsys, "plan", tmp_path / "own.yaml", "--slots", 1, "--format", "json")
    assert code == 0
    rungs = json.loads(out)["rungs"]
    assert [rung["total"]["tokens"][0] for rung in rungs] == [50 * 9, 50 * 9 - 2 * 50, 100 * 9 - 2 * 100]
    speeds = [rung["speeds"]["plain"] for rung in rungs]
    assert speeds[0] / speeds[2] == pytest.approx(8, rel=0.3)
