"""Tests of the subject that runs the user's own command."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.own_trainings import FUNCTION, own_study
from tests.tune.helpers import trained_to_the_end
from tune.backend.inline import Inline
from tune.errors import StudyError
from tune.study.cell import Cell
from tune.study.files import find
from tune.subject.command import Command, parsed
from tune.subject.own_worker import Refused
from tune.subject.sources import draft
from tune.subject.subject import Job
from tune.sweep import sweep

SCRIPT = """
import math, random, sys, time
import noise
lr, shift, seed, budget = float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
test = sys.argv[5] == "1"
draw = random.Random(f"{seed}/{shift}/{budget}")
print("starts")
for step in range(10, budget + 1, 10):
    loss = 2 + math.log10(lr / 0.1) ** 2 + 20 / step - shift + noise.SIZE * draw.random()
    print(f"METRIC val_loss={loss} speed=3 step={step}", flush=True)
if test:
    print(f"METRIC test_loss={loss + 0.01}")
"""
WORDS = f"{sys.executable} script.py {{lr}} {{shift}} {{seed}} {{budget}} {{test}}"


def command_study(folder: Path, script: str = SCRIPT, words: str = WORDS, **changes):
    """Return a study that runs a script of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "script.py").write_text(script, encoding="utf-8")
    return own_study(folder, trial={"command": words}, **changes)


def trained(folder: Path, script: str = SCRIPT, stage: str = "search", **changes):
    """Train one cell; return the last result and the rows."""
    study = command_study(folder, script, **changes)
    (folder / "out").mkdir(exist_ok=True)
    subject = Command(study, draft(study, folder, folder / "out").write())
    job = Job("a", subject.trial(Cell(stage, "shifted", 0, 1, {"lr": 0.1}, "k")), subject.train, None, 40)
    return trained_to_the_end(job)


SHELL = """
set -eu
lr=$1 shift=$2 seed=$3 budget=$4 test=$5
for step in $(seq 10 10 "$budget"); do
  loss=$(awk "BEGIN { print 2 + $lr + 20 / $step - $shift + $seed / 100 }")
  echo "METRIC val_loss=$loss step=$step"
done
if [ "$test" = 1 ]; then echo "METRIC test_loss=$loss"; fi
"""


def test_a_shell_script_reports_as_the_docs_say(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "own-training.md").read_text(encoding="utf-8")
    assert '`echo "METRIC val_loss=$loss step=$step"`' in page
    (tmp_path / "train.sh").write_text(SHELL)
    words = "bash train.sh {lr} {shift} {seed} {budget} {test}"
    result, rows = trained(tmp_path, stage="confirm", words=words)
    assert [row["val_nll"] for row in rows] == pytest.approx([2.01 + 20 / step for step in (10, 20, 30, 40)], abs=1e-4)
    assert result["final"]["test_nll"] == rows[-1]["val_nll"]


def test_a_command_reports_by_its_lines(tmp_path):
    result, rows = trained(tmp_path, stage="confirm")
    assert (result["outcome"], [row["step"] for row in rows]) == ("completed", [10, 20, 30, 40])
    assert rows[0]["speed"] == 3
    assert result["final"]["test_nll"] == pytest.approx(rows[-1]["val_nll"] + 0.01)
    assert "test_nll" not in trained(tmp_path)[0]["final"]


SABOTAGE = {
    "malformed line": (SCRIPT.replace("val_loss={loss} ", "val_loss "), "failed",
        "is not of the form METRIC NAME=NUMBER"),
    "no number": (SCRIPT.replace("{loss} ", "low "), "failed", "val_loss is no number in the line"),
    "no step": (SCRIPT.replace(" step={step}", ""), "failed", "has no step"),
    "exit 0 without a metric": ("print('done')", "failed", "no METRIC line was printed"),
    "too short": (SCRIPT.replace("budget + 1", "budget - 5"), "failed", "the last report was at step 30 of 40 steps"),
    "other exit code": (SCRIPT + "sys.exit('no disk')", "failed",
        "its process ended with exit code 1; its last line: no disk"),
    "not a number": (SCRIPT.replace("{loss} ", "nan "), "infeasible", "val_loss is nan at step 10"),
    "test metric in the search": (SCRIPT.replace("if test", "if True"), "failed",
        "printed test_loss although {test} is 0"),
    "too long": (SCRIPT.replace("budget + 1", "budget + 11"), "failed", "got step 50.0 after 40"),
    "hang": (SCRIPT + "time.sleep(60)", "failed", "no report for 1 s (resources.stall_timeout)"),
}  # fmt: skip


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_command_that_breaks_the_protocol_is_named_in_a_line(tmp_path, name):
    script, outcome, said = SABOTAGE[name]
    result, _ = trained(tmp_path, script, resources={"stall_timeout": 1.0} if name == "hang" else {})
    assert (result["outcome"], "\n" in result["reason"]) == (outcome, False), result["reason"]
    assert said in result["reason"]


def test_the_test_metric_has_to_come_in_the_last_stage(tmp_path):
    result, _ = trained(tmp_path, SCRIPT.replace("if test", "if False"), stage="confirm")
    assert result["reason"] == "the command did not print METRIC test_loss=... although {test} is 1"


def test_lines_that_are_no_reports_are_output():
    assert parsed("METRICS of step 3") is None
    assert parsed("loss=3") is None
    assert parsed("METRIC a=1 step=2") == {"a": "1", "step": "2"}
    with pytest.raises(Refused):
        parsed("METRIC a 1")


def test_a_command_that_is_not_there_fails_in_a_line(tmp_path):
    result, _ = trained(tmp_path, words=WORDS.replace(sys.executable, "no-such-program"))
    assert result["reason"] == "no-such-program: No such file or directory"


def test_a_study_of_a_command_goes_on_from_its_folder(tmp_path):
    study = command_study(tmp_path, stages=["search"])
    run = sweep(study, tmp_path, tmp_path / "studies", Inline())
    assert run.stages.finished
    found = find(run.folder, tmp_path / "studies")
    assert (found.base / found.study.trial.folder).resolve() == tmp_path.resolve()
    again = sweep(found.study, found.base, found.output, Inline())
    assert again.records.keys() == run.records.keys()


def test_another_command_is_refused(tmp_path):
    sweep(command_study(tmp_path, stages=["search"]), tmp_path, tmp_path / "studies", Inline())
    other = command_study(tmp_path, words=WORDS + " x", stages=["search"])
    with pytest.raises(StudyError, match=r"trial was '.* \{test\}' and is now '.* x'"):
        sweep(other, tmp_path, tmp_path / "studies", Inline())


def test_a_changed_file_of_a_command_is_refused(tmp_path):
    study = command_study(tmp_path, stages=["search"])
    subject = Command(study, draft(study, tmp_path, tmp_path / "out").write())
    sweep(study, tmp_path, tmp_path / "studies", Inline())
    (tmp_path / "noise.py").write_text("SIZE = 0.5\n")
    with pytest.raises(StudyError, match=r"noise\.py is not the file that the study was begun with"):
        sweep(study, tmp_path, tmp_path / "studies", Inline())
    with pytest.raises(StudyError, match=r"noise\.py has changed since the study began"):  # while it runs
        subject.trial(Cell("search", "plain", 0, 1, {"lr": 0.1}, "k"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize("kind", ["function", "command"])
def test_a_trial_ends_with_the_process_that_trains_it(tmp_path, kind):
    """Kill the process of a study: the training must not go on, or the next attempt would run beside it."""
    told = tmp_path / "pid"
    line = f"import os; open({str(told)!r}, 'w').write(str(os.getpid())); import time; time.sleep(60)\n"
    if kind == "command":
        command_study(tmp_path, "import sys\n" + line, stages=["search"])
    else:
        own_study(tmp_path, FUNCTION.replace("    draw =", f"    {line}    draw ="), stages=["search"])
    program = "from pathlib import Path; from tune.sweep import sweep; from tune.backend.inline import Inline; "
    program += f"from tune.study.files import load; p = Path({str(tmp_path)!r}); "
    program += "sweep(load(p / 'own.yaml'), p, p / 'studies', Inline())"
    with subprocess.Popen([sys.executable, "-c", program]) as study:
        wait_for(lambda: told.exists() and told.read_text())
        study.kill()
    pid = int(told.read_text())
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text())


def wait_for(condition) -> None:
    """Wait until a condition holds, for 20 s at most."""
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
