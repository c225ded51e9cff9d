"""Tests of the process that trains one trial of the user's function after the other (`reuse: true`)."""

import os
from pathlib import Path

import pytest

from tests.own_trainings import FUNCTION, own_study
from tests.tune.backend.test_own_training import without_clock
from tests.tune.helpers import trained_to_the_end
from tune.backend.inline import Inline
from tune.errors import StudyError
from tune.run import ledger
from tune.study.cell import Cell
from tune.subject.check import check
from tune.subject.function import Function, release, waits
from tune.subject.sources import draft
from tune.subject.subject import Job
from tune.sweep import sweep

# tells its process, and does something in the trial of a seed
TELLS = FUNCTION.replace(
    "    draw =",
    "    import os, sys, time\n    print('seed', trial.seed, flush=True)\n"
    "    with open(os.environ['TOLD'], 'a') as file:\n        print(os.getpid(), file=file)\n    draw =",
)
LEAK = "LEFT = []\n" + FUNCTION.replace(" - trial.shift", " - trial.shift - len(LEFT)").replace(
    "    return", "    LEFT.append(1)\n    return"
)


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Return a function that returns the processes of the trials so far; end the idle one after the test."""
    path = tmp_path / "told.txt"
    monkeypatch.setenv("TOLD", str(path))
    yield lambda: path.read_text().split()
    release()


def trials_of(folder: Path, function: str, **changes):
    """Return a function that trains a cell of a seed and returns the last result, and the folder of the trials."""
    study = own_study(folder, function, reuse=True, **changes)
    (folder / "out").mkdir()
    subject = Function(study, draft(study, folder, folder / "out").write())

    def train(seed: int):
        place = folder / "out" / str(seed)
        job = Job(
            "a", subject.trial(Cell("search", "shifted", 0, seed, {"lr": 0.1}, "k")), subject.train, str(place), 40
        )
        return trained_to_the_end(job)[0]

    return train


def test_a_study_has_the_same_rows_as_with_fresh_processes(tmp_path, told):
    found, processes = {}, {}
    for name, reuse in (("fresh", False), ("reused", True)):
        study = own_study(tmp_path / name, TELLS, reuse=reuse, search={"trials_per_arm": 4})
        before = len(told()) if found else 0
        run = sweep(study, tmp_path / name, tmp_path / name / "studies", Inline())
        found[name] = [without_clock(event) for event in ledger.read(run.folder / "ledger.jsonl")]
        processes[name] = len(set(told()[before:]))
        early = sum(event.get("outcome") == "stopped_early" for event in found[name])
    assert found["fresh"] == found["reused"]
    assert early > 0
    assert processes["fresh"] == 33
    assert processes["reused"] == early + 1  # a trial that is stopped takes its process with it
    assert not waits()  # the sweep ends it


ENDS = {
    "kill": ("os.kill(os.getpid(), 9)", {}, "by signal 9"),
    "hang": ("time.sleep(60)", {"resources": {"stall_timeout": 1.0}}, "no report for 1 s"),
    "exception": ("{}['key']", {}, "KeyError"),
    "exit": ("os._exit(0)", {}, "ended with exit code 0"),
    "memory": ("globals().update(kept=b'x' * (100 << 20))", {}, None),
    "child": ("__import__('subprocess').Popen(['sleep', '60'])", {}, None),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_process_is_replaced_after(name, tmp_path, told):
    what, changes, said = ENDS[name]
    train = trials_of(
        tmp_path, TELLS.replace("    draw =", f"    if trial.seed == 3:\n        {what}\n    draw ="), **changes
    )
    results = {seed: train(seed) for seed in (1, 2, 3, 4, 5)}
    assert [result["outcome"] for seed, result in results.items() if seed != 3] == ["completed"] * 4
    assert results[3]["outcome"] == ("failed" if said else "completed")
    assert said is None or said in results[3]["reason"]
    one, two, three, four, five = told()
    assert one == two == three != four == five
    with pytest.raises(ProcessLookupError):
        os.kill(int(three), 0)


def test_each_trial_has_its_output_its_folder_and_its_memory(tmp_path, told):
    big = TELLS.replace(
        "    draw =", "    if trial.seed == 1:\n        bytearray(80 << 20)\n    os.chdir('/')\n    draw ="
    )
    train = trials_of(tmp_path, big.replace("    with open", "    assert os.getcwd() != '/'\n    with open"))
    kept = {}
    for seed in (1, 2):
        place = tmp_path / "out" / str(seed)
        place.mkdir()
        kept[seed] = train(seed)["final"]["peak_rss_mb"]
    assert kept[1] > 80
    assert kept[2] < 60
    assert len(set(told())) == 1


def test_a_process_of_another_function_is_not_taken(tmp_path, told):
    trials_of(tmp_path / "a", TELLS)(1)
    trials_of(tmp_path / "b", TELLS)(1)
    assert len(set(told())) == 2


def test_the_check_finds_state_that_is_kept_between_trials(tmp_path):
    good = {finding.what: finding for finding in check(own_study(tmp_path, reuse=True), tmp_path, 1.0)}
    assert good["a reused process"].passed
    assert good["a reused process"].said == "same bits as in a fresh one"
    bad = {finding.what: finding for finding in check(own_study(tmp_path, LEAK, reuse=True), tmp_path, 1.0)}
    assert bad["a reused process"].passed is False
    assert "val_loss 1 apart from a fresh one: the function keeps state" in bad["a reused process"].said
    child = TELLS.replace(
        "    with open(os.environ['TOLD'], 'a') as file:\n        print(os.getpid(), file=file)\n", ""
    )
    child = child.replace("    draw =", "    __import__('subprocess').Popen(['sleep', '9'])\n    draw =")
    none = {finding.what: finding for finding in check(own_study(tmp_path, child, reuse=True), tmp_path, 1.0)}
    assert none["a reused process"].passed is None
    assert "a reused process" not in {finding.what for finding in check(own_study(tmp_path), tmp_path, 1.0)}
    assert not waits()


def test_a_command_is_never_reused(tmp_path):
    command = {"command": "python train.py --lr {lr} --shift {shift} --seed {seed} --steps {budget}"}
    with pytest.raises(StudyError, match="reuse: a command is a process of its own for each trial"):
        own_study(tmp_path, trial=command, reuse=True)
