"""The end of `pagating sweep`, without Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from pandas import read_parquet

from tests.own_trainings import FUNCTION, own_study
from tests.studies import TINY, yaml_of
from tests.tune.helpers import typed
from tune import sweep as study_sweep
from tune.cli import main, sweep
from tune.cli.common import seconds_of
from tune.cli.endings import ENDS, seconds_left
from tune.cli.screen import Screen
from tune.errors import StudyError, StudyStopped
from tune.study.files import load

SMOKE = Path(__file__).parents[3] / "configs" / "smoke.yaml"


def test_a_hopeless_study_says_why_in_one_line_without_a_password(monkeypatch, capsys):
    reasons = [None, "OSError: cannot reach\n  \x1b[31mhttp://me:s3cret@host/data?key=t0ken", "another"]
    records = {str(number): SimpleNamespace(reason=reason) for number, reason in enumerate(reasons)}
    run = SimpleNamespace(stages=SimpleNamespace(finished=True, hopeless=True), records=records)
    monkeypatch.setattr(study_sweep, "sweep", lambda *args, **kwargs: run)
    code = sweep._run(load(SMOKE), SMOKE.parent, Path("none"), "none", None, None, Screen())
    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert err == (
        "No search trial could be trained, so there is nothing to compare. The first said: "
        "OSError: cannot reach \\x1b[31mhttp://***@host/data?key=***\n"
    )


def test_a_warning_is_one_line_without_a_password(capsys):
    Screen().warn("cannot write\nhttp://me:s3cret@host")
    assert capsys.readouterr().err == "Warning: cannot write http://***@host\n"


def test_what_the_machine_refuses_ends_the_command_with_one_line(monkeypatch, capsys, tmp_path):
    def stopped(*args, **kwargs):
        raise StudyStopped("Ray did not start.\nIt said: \x1b[31m http://me:s3cret@host")

    monkeypatch.setattr(study_sweep, "sweep", stopped)
    words = ["pagating", "sweep", str(SMOKE), "--output", str(tmp_path), "--tracking", "none", "--json"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    said = "Ray did not start. It said: \\x1b[31m http://***@host"
    assert err == f"pagating: {said}\n"
    end = json.loads(out.splitlines()[-1])
    assert [end[key] for key in ("event", "state", "exit_code", "reason")] == ["end", "failed", 1, said]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("90m", 5400), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400), ("2d 1min", 172_860)],
)
def test_times_with_a_unit(text, seconds):
    assert seconds_of(text, "--time-budget") == seconds


@pytest.mark.parametrize("text", ["", "2", "0s", "h", "-1h", "1..5h", "2x", "30m1h", "99d", "1h30"])
def test_no_time(text):
    with pytest.raises(StudyError, match=r"--time-budget .*: allowed: a time such as 90m"):
        seconds_of(text, "--time-budget")


def test_a_sweep_that_is_started_again_has_what_is_left_of_its_time(monkeypatch):
    assert seconds_left(60.0) == 60.0
    monkeypatch.setenv(ENDS, str(time.time() + 20))
    assert 18 < seconds_left(60.0) <= 20
    assert ENDS not in os.environ
    monkeypatch.setenv(ENDS, "1")
    assert 0 < seconds_left(60.0) < 1


def test_a_time_budget_ends_in_good_order_and_programs_read_every_event(tmp_path, monkeypatch, capsys):
    slow = FUNCTION.replace("def train(trial):", "def train(trial):\n    time.sleep(0.15)")
    own_study(tmp_path, f"import time\n{slow}")
    told = tmp_path / "told"
    then = f'echo "$PAGATING_STUDY $PAGATING_STATE $PAGATING_EXIT" >> "{told}"'
    monkeypatch.chdir(tmp_path)
    words = ("sweep", "own.yaml", "--inline", "--tracking", "none", "--json", "--then", then)

    env = {**os.environ, "PYTHONPATH": str(SMOKE.parents[1])}

    def swept(*more):
        command = [sys.executable, "-m", "tune.cli", *words, *more]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    code, lines, err = swept("--time-budget", "3s")
    assert code == 1
    said = "The time budget of 3s is over. What has ended is kept; the same command continues from there."
    assert err.splitlines()[-1] == said
    assert [line["event"] for line in (lines[0], lines[-1])] == ["begin", "end"]
    assert (lines[-1]["state"], lines[-1]["exit_code"]) == ("unfinished", 1)
    cells = [line for line in lines if line["event"] == "cell"]
    assert len(cells) < 27
    code, out, _ = typed(monkeypatch, capsys, "status", "own", "--json")
    found = json.loads(out)
    assert (found["state"], found["ended"], found["finished"]) == ("not finished", len(cells), False)
    with subprocess.Popen([sys.executable, "-m", "tune.cli", *words], env=env, stdout=-1, stderr=-1, text=True) as one:
        read = [json.loads(one.stdout.readline()) for _ in range(2)]  # until a trial has ended
        one.send_signal(signal.SIGTERM)
        lines = read + [json.loads(line) for line in one.communicate()[0].splitlines()]
    assert (one.returncode, lines[-1]["event"], lines[-1]["state"]) == (143, "end", "interrupted")
    cells += [line for line in lines if line["event"] == "cell"]
    code, more, err = swept()
    assert (code, err) == (0, "")
    cells += [line for line in more if line["event"] == "cell"]
    assert (len(cells), cells[0]["cell"]) == (27, "search/plain/0/1")
    assert (cells[0]["outcome"], cells[0]["config"]["lr"] > 0, cells[0]["val_loss"] > 2) == ("completed", True, True)
    code, out, _ = typed(monkeypatch, capsys, "status", "own", "--json")
    found = json.loads(out)
    assert found["stages"]["search"] == {
        **dict.fromkeys(("running", "stopped_early", "infeasible", "failed"), 0),
        **dict.fromkeys(("completed", "least", "expected", "most"), 6),
    }
    best = min(cell["val_loss"] for cell in cells if (cell["stage"], cell["arm"]) == ("search", "plain"))
    assert found["arms"]["plain"]["search"] == {"val_loss": best, "trials": 1}
    assert [line["event"] for line in more[-2:]] == ["verdict", "end"]
    assert {row["arm"]: row["verdict"] for row in more[-2]["comparisons"]} == {"shifted": "better", "short": "worse"}
    assert told.read_text() == "own unfinished 1\nown finished 0\n"


def test_a_packed_sweep_has_the_losses_of_one_trial_after_the_other(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.yaml").write_text(yaml_of(TINY, search={"pruner": "none", "trials_per_arm": 2}))
    losses = {}
    for how in (("--inline",), ("--packed", 8)):
        output = tmp_path / how[0]
        words = ("sweep", tmp_path / "tiny.yaml", "--output", output, "--tracking", "none", *how)
        code, _, err = typed(monkeypatch, capsys, *words)
        assert (code, err) == (0, "")
        rows = read_parquet(output / "tiny" / "trials.parquet")
        losses[how[0]] = rows.set_index(["stage", "arm", "trial", "seed"])["val_nll"].sort_index()
        assert ("packed" in rows.columns and (rows["packed"] > 1).any()) == (how[0] == "--packed")
    one, packed = losses.values()
    assert len(one) > 10
    assert packed.to_dict() == pytest.approx(one.to_dict(), rel=1e-4)


def test_options_of_ray_are_refused_beside_inline_and_a_missing_folder_of_results_is_named(
    tmp_path, monkeypatch, capsys
):
    rays = (("--address", "auto"), ("--slots", 2))
    for here in (("--inline",), ("--packed", 8)):
        for option, value in [*rays, *([("--packed", 8)] if here[0] == "--inline" else [])]:
            code, out, err = typed(monkeypatch, capsys, "sweep", SMOKE, "--output", tmp_path, *here, option, value)
            assert (code, out) == (2, "")
            assert err == f"pagating: {here[0]} trains in this process: leave out {option}\n"
    assert list(tmp_path.iterdir()) == []
    own_study(tmp_path, FUNCTION)
    code, _, err = typed(monkeypatch, capsys, "sweep", tmp_path / "own.yaml", "--packed", 8, "--tracking", "none")
    assert (code, err) == (
        2,
        "pagating: --packed is for the built-in models; a training of your own has one trial per process\n",
    )
    code, _, err = typed(monkeypatch, capsys, "take", SMOKE)
    assert (code, err.count("\n")) == (2, 1)
    assert "'results'. Folder of cells, its results/, or the file of one result." in err
