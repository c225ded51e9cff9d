"""Tests of cells of the user's own training: trained elsewhere with Python's own library only, and taken once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from pagating.cells import runner
from pagating.cells.folder import cells_of, json_digest, read_result, write_result
from tests.own_trainings import FUNCTION, own_study, own_yaml
from tests.tune.helpers import typed
from tune.backend.inline import Inline
from tune.sweep import sweep

CLOCK = ["seconds", "steps_per_second", "peak_rss_mb", "memory_growth_mb"]
NONE = {"search": {"trials_per_arm": 2, "pruner": "none"}}
COMMAND = """import sys
from model import loss_at
lr, seed, budget, test, shift = (float(word) for word in sys.argv[1:])
for step in range(10, int(budget) + 1, 10):
    loss = loss_at(lr, seed, step) - shift
    print(f"METRIC val_loss={loss} step={step}")
if test:
    print(f"METRIC test_loss={loss}")
"""
MODEL = """import math
import random
def loss_at(lr, seed, step):
    return 2 + math.log10(lr / 0.1) ** 2 + 20 / step + 0.02 * random.Random(seed).random()
"""


@pytest.fixture
def say(monkeypatch, capsys, tmp_path):
    """Return a function that types a command in a folder with a study file, and returns its code, output and errors."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: typed(monkeypatch, capsys, *words)


def elsewhere(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Train the cells of a folder as a machine without any package does."""
    command = [sys.executable, "-I", "-S", str(folder / "run.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env={"PATH": "/usr/bin:/bin"}, check=False)


def trials_of(folder):
    """Return the table of trials without times, sorted by cell."""
    table = pd.read_parquet(folder / "trials.parquet").drop(columns=CLOCK, errors="ignore")
    return table.sort_values(["stage", "arm", "trial", "config_key", "seed"]).reset_index(drop=True)


def begun(say, base, function=FUNCTION, **changes):
    """Begin a study with cells, and move them away as to another machine. Return their folder."""
    own_study(base, function, **changes)
    new = not (base / "studies").exists()
    code, out, err = say("cells", "own.yaml", "--into", "cells")
    assert (code, err.startswith("not checked: ") if new else not err) == (0, True)
    assert "Train them:  python cells/run.py" in out
    shutil.rmtree(base / "away", ignore_errors=True)
    shutil.copytree(base / "cells", base / "away")
    return base / "away"


def test_a_study_in_cells_is_that_of_a_sweep(tmp_path, say):
    study = own_study(tmp_path / "swept", **NONE)
    whole = sweep(study, tmp_path / "swept", tmp_path / "swept/studies", Inline())
    code = "unfinished"
    for _ in range(8):
        away = begun(say, tmp_path, **NONE)
        done = elsewhere(away)
        assert (done.returncode, done.stderr) == (0, "")
        code, out, _ = say("take", "own.yaml", "away", "--tracking", "none")
        if "Verdict" in out or "better" in out:
            break
    assert code == 0
    pd.testing.assert_frame_equal(trials_of(tmp_path / "studies/own"), trials_of(whole.folder))


def test_a_result_that_is_not_of_its_trial_is_refused(tmp_path, say):
    away = begun(say, tmp_path)
    assert elsewhere(away, "--part", "1/3").returncode == 0
    (cell,) = [cell for cell in cells_of(away) if cell.result.exists()]
    good = read_result(cell.result)
    bad = {
        "its last report is not at the end of its 40 steps": {"rows": good.rows[:-1]},
        "its final val_loss is not that of its last report": {"final": {**good.final, "val_nll": 1.0}},
        "it has a test_loss, which the last stage alone reads": {"final": {**good.final, "test_nll": 1.0}},
        "is of another trial than that of": {"sha256": json_digest({})},
        "its reports are not at growing steps up to 40 steps": {"rows": good.rows[::-1]},
        "the report at step 10 has no finite val_loss": {"rows": [{**good.rows[0], "val_nll": None}, *good.rows[1:]]},
    }
    for said, change in bad.items():
        write_result(cell.result, type(good)(**{**vars(good), **change}))
        code, out, err = say("take", "own.yaml", "away", "--tracking", "none")
        assert (code, out.startswith("0 taken, 0 already known, 1 refused")) == (2, True)
        assert said in err
    write_result(cell.result, good)
    assert say("take", "own.yaml", "away", "--tracking", "none")[1].startswith("1 taken")
    assert say("take", "own.yaml", "away", "--tracking", "none")[1].startswith("0 taken, 1 already known")


def test_a_changed_file_is_refused_and_a_failed_trial_has_no_result(tmp_path, say, capsys):
    away = begun(say, tmp_path, FUNCTION.replace("    off =", "    assert not trial.shift, 'no shift'\n    off ="))
    done = elsewhere(away)
    assert done.returncode == 1
    assert "AssertionError: no shift (mine.py, line" in done.stdout
    assert "2 of 3 cells have a result" in done.stdout
    (away / "code/noise.py").write_text("SIZE = 9.0\n")
    done = elsewhere(away)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "noise.py is not the file that the study was begun with" in done.stderr
    assert runner.main([str(away), "--only", cells_of(away)[0].cell]) == 0  # it has its result
    left = next(cell for cell in cells_of(away) if not cell.result.exists())
    assert runner.main([str(away), "--only", left.cell]) == 2
    assert "runs the study's own code: python" in capsys.readouterr().err


def test_an_infeasible_trial_is_a_result(tmp_path, say):
    function = FUNCTION.replace("    off =", "    if trial.shift: raise trial.Infeasible('too far')\n    off =")
    away = begun(say, tmp_path, function)
    assert elsewhere(away, "--workers", "2").returncode == 0
    assert say("take", "own.yaml", "away", "--tracking", "none")[1].startswith("3 taken")
    _, out, _ = say("trial", "own")
    (key,) = [line.split("\t")[0] for line in out.splitlines() if "infeasible" in line]
    (tmp_path / "t.json").write_text(say("trial", "own", key)[1])
    code, out, _ = say("train", "t.json")
    assert (code, json.loads(out)) == (1, {"outcome": "infeasible", "reason": "too far"})


def test_a_trial_is_trained_again_to_the_same_bits(tmp_path, say):
    study = own_study(tmp_path)
    run = sweep(study, tmp_path, tmp_path / "studies", Inline())
    record = next(record for record in run.records.values() if record.cell.stage == "confirm")
    (tmp_path / "t.json").write_text(say("trial", "own", record.cell.key)[1])
    code, out, err = say("train", "t.json", "--checkpoints", "kept")
    found = json.loads(out)
    assert code == 0
    assert (found["val_loss"], found["test_loss"]) == (record.final["val_nll"], record.final["test_nll"])
    assert err.splitlines()[-1] == f"{record.final['steps']}/{record.final['steps']} steps val_loss " + (
        f"{found['val_loss']:.6g}"
    )
    assert (tmp_path / "kept/output.txt").exists()
    (tmp_path / "t.json").write_text(json.dumps({"test_metric": "x"}))
    code, _, err = say("train", "t.json")
    assert (code, err.count("\n")) == (2, 1)


def test_the_files_of_a_command_travel_or_are_refused(tmp_path, say):
    """The command's file and the module that it imports travel; one above its folder is refused."""
    (tmp_path / "train.py").write_text(COMMAND)
    (tmp_path / "model.py").write_text(MODEL)
    line = f"{sys.executable} train.py {{lr}} {{seed}} {{budget}} {{test}} {{shift}}"
    (tmp_path / "own.yaml").write_text(own_yaml(trial={"command": line}))
    assert say("cells", "own.yaml", "--into", "cells")[0] == 0
    shutil.move(tmp_path / "cells", tmp_path / "away")
    assert sorted(path.name for path in (tmp_path / "away/code").iterdir()) == ["model.py", "train.py"]
    (tmp_path / "model.py").rename(tmp_path / "gone.py")
    done = elsewhere(tmp_path / "away")
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "gone.py").rename(tmp_path / "model.py")
    assert say("take", "own.yaml", "away", "--tracking", "none")[1].startswith("3 taken")
    (tmp_path / "inner").mkdir()
    above = {"command": line.replace("train.py", "../train.py"), "folder": "inner"}
    (tmp_path / "above.yaml").write_text(own_yaml(trial=above))
    code, _, err = say("cells", "above.yaml")
    assert (code, err.count("\n")) == (2, 2)  # the first line says that it is not checked
    assert "trial.command: ../model.py is not below" in err or "trial.command: ../train.py is not below" in err
