"""Tests of `tune.run_study` and its neighbours, in this process and in fresh ones."""

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

import tune
from tests.own_trainings import FUNCTION, NOISE, OWN, own_study
from tune.errors import StudyError, StudyStopped
from tune.subject.process import IN_TRIAL

KEYS = {key: value for key, value in OWN.items() if key != "trial"}
INTERRUPTS = FUNCTION.replace(
    "    draw =",
    "    import os, pathlib\n    mark = pathlib.Path('interrupted')\n"
    "    if trial.test and not mark.exists():\n        mark.touch()\n        os.kill(os.getppid(), 2)\n    draw =",
)


def function_in(folder: Path, source: str = FUNCTION):
    """Write a user's file; return its function as an import would."""
    (folder / "mine.py").write_text(source, encoding="utf-8")
    (folder / "noise.py").write_text(NOISE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mine", folder / "mine.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["noise"] = type(sys)("noise")
    spec.loader.exec_module(module)
    del sys.modules["noise"]
    return module.train


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Return the result of a study that was run from a function object, inside a running event loop."""
    base = tmp_path_factory.mktemp("api")
    trial = function_in(base)

    async def cell():
        return tune.run_study(trial=trial, output=base / "studies", progress=False, **KEYS)

    return asyncio.run(cell())


def test_a_result_has_the_tables_of_the_study(result):
    assert result.finished
    assert result.folder.name == "mine"  # the file of the function names the study
    assert dict(result.trials["stage"].value_counts()) == {"confirm": 12, "calibrate": 9, "search": 6}
    assert {"val_loss", "test_loss", "lr", "steps"} <= set(result.trials)
    assert set(result.curves["steps"]) == {10, 20, 30, 40}
    pd.testing.assert_frame_equal(result.trials, pd.read_parquet(result.folder / "trials.parquet"))


def test_a_verdict_is_typed_and_can_be_read(result):
    shifted, confirm = result.verdict.of("shifted"), result.trials[result.trials["stage"] == "confirm"]
    means = confirm.groupby("arm")["test_loss"].mean()
    assert shifted.improvement_percent == pytest.approx(100 * (1 - means["shifted"] / means["plain"]))
    assert shifted.kind == "better"
    assert repr(result.verdict).startswith(result.verdict.summary)
    assert "| shifted" in result.verdict._repr_markdown_()
    assert "shifted: better" in repr(result)
    with pytest.raises(StudyError, match="no arm 'shiftd'; it has shifted, short"):
        result.verdict.of("shiftd")


def test_figures_are_shown_and_the_report_is_there(result):
    assert {"differences", "learning_rate", "loss_curves"} <= result.figures.keys()
    one = result.figures["differences"]
    assert one.plot.axes
    assert one._repr_html_().startswith('<figure style="background:white"><svg')
    assert result.figures._repr_html_().count("<figure") == len(result.figures)
    assert result.report == result.folder / "report.html"
    known = json.loads((result.folder / "verdict.json").read_text(encoding="utf-8"))
    assert known["summary"] == result.verdict.summary


def test_a_study_is_loaded_again_without_training(result):
    again = tune.load_study("mine", output=result.folder.parent)
    assert again.finished
    assert again.verdict.summary == result.verdict.summary
    with pytest.raises(StudyError, match="did you mean mine"):
        tune.load_study("mien", output=result.folder.parent)


def test_an_interrupted_call_keeps_what_ended_and_the_same_call_continues(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    trial, before = function_in(tmp_path, INTERRUPTS), signal.default_int_handler
    signal.signal(signal.SIGINT, before)  # a background process may begin with the signal ignored
    with pytest.raises(KeyboardInterrupt, match="what has ended is kept; the same call continues"):
        tune.run_study(trial=trial, name="stopped", **KEYS)
    assert signal.getsignal(signal.SIGINT) is before
    out, err = capfd.readouterr()
    assert "Stopping: what has ended is kept" in err
    part = tune.load_study("stopped")
    assert not part.finished
    assert 15 <= part.trials["outcome"].notna().sum() < 27
    assert "it has not ended" in repr(part)
    whole = tune.run_study(trial=trial, name="stopped", **KEYS)
    assert whole.finished
    assert (len(out.splitlines()) + len(capfd.readouterr().out.splitlines())) == 27  # none was trained twice


def test_errors_are_one_line_and_leave_the_study_usable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trial, given = function_in(tmp_path), {"name": "short", **KEYS, "stages": ["search"]}
    given["search"] = {"trials_per_arm": 1}
    first = tune.run_study(given | {"trial": trial})
    (tmp_path / "mine.py").write_text(FUNCTION + "# changed\n")
    with pytest.raises(StudyError, match=r"mine\.py has changed since the study began"):
        tune.run_study(given | {"trial": trial})
    (tmp_path / "mine.py").write_text(FUNCTION)
    assert len(tune.run_study(given | {"trial": trial}).trials) == len(first.trials) == 3
    with pytest.raises(StudyError, match="run_study: unknown key 'trals'; did you mean 'trial'"):
        tune.run_study(given | {"trial": trial}, trals=3)
    with pytest.raises(StudyError, match="give a file or keys, not both"):
        tune.run_study("a.yaml", budget={"steps": 3})
    with pytest.raises(StudyError, match="backend 'dask' must be 'inline' or 'ray'"):
        tune.run_study(given | {"trial": trial}, backend="dask")
    broken = function_in(tmp_path, FUNCTION.replace("draw =", "{}['key']; draw ="))
    with pytest.raises(StudyStopped, match="KeyError: 'key'"):
        tune.run_study(given | {"trial": broken, "name": "broken"})


def test_a_study_runs_in_a_thread_and_from_its_file(tmp_path):
    own_study(tmp_path, stages=["search"], search={"trials_per_arm": 1})
    found = []
    thread = threading.Thread(
        target=lambda: found.append(tune.run_study(tmp_path / "own.yaml", output=tmp_path / "studies", progress=False))
    )
    thread.start()
    thread.join()
    assert len(found[0].trials) == 3


def test_a_function_that_a_fresh_process_cannot_load_is_refused(tmp_path):
    cell = {"__name__": "__main__"}
    exec(compile("def train(trial): pass", "<ipython-input-1>", "exec"), cell)
    with pytest.raises(StudyError, match=r"begin its cell with `%%writefile my_train\.py`"):
        tune.run_study(trial=cell["train"], **KEYS)
    with pytest.raises(StudyError, match=r"<lambda> .*test_api\.py is inside another function"):
        tune.run_study(trial=lambda trial: None, **KEYS)


def test_a_study_within_a_trial_is_refused(monkeypatch):
    monkeypatch.setenv(IN_TRIAL, "1")
    with pytest.raises(StudyError, match='below `if __name__ == "__main__":`'):
        tune.run_study(trial="mine.py:train", **KEYS)


def test_a_check_says_what_would_spoil_the_verdict(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trial = function_in(tmp_path)
    good = tune.check_study(trial=trial, share=1.0, output=tmp_path, **KEYS)
    assert good.passed
    assert "ok      the same seed again: same bits" in repr(good)
    bad = tune.check_study(
        trial=function_in(tmp_path, FUNCTION.replace("{trial.seed}", "")), share=1.0, output=tmp_path, **KEYS
    )
    assert not bad.passed


def test_the_package_is_cheap_to_import():
    code = "import sys, tune; print([name for name in ('torch', 'pandas', 'pydantic', 'ray') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert set(tune.__all__) <= set(dir(tune))
    with pytest.raises(AttributeError, match="no attribute 'run_studie'"):
        _ = tune.run_studie


@pytest.mark.slow
def test_a_script_without_a_guard_is_refused_and_one_with_it_runs(tmp_path):
    head = (
        "import tune\n" + FUNCTION.replace("import noise\n", "").replace("noise.SIZE", "0.02") + f"\nKEYS = {KEYS!r}\n"
    )
    call = "tune.run_study(trial=train, stages=['search'], backend='ray', slots=2, **KEYS)\n"
    for name, source, code in (
        ("open", head + call, 1),
        ("guarded", f"{head}if __name__ == '__main__':\n    print(len({call.strip()}.trials))\n", 0),
    ):
        (tmp_path / f"{name}.py").write_text(source)
        root = str(Path(__file__).parents[2])
        done = subprocess.run(
            [sys.executable, f"{name}.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root},
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "6"
