"""Tests of the calibration of a plan, which trains each arm briefly in several processes."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.studies import SMALL, study_of, yaml_of
from tests.tune.helpers import models_of, typed
from tune.plan import child, plan, probe
from tune.plan.child import ChildError, ChildTimeout, answers
from tune.plan.probe import Speed
from tune.study import sizes

torch.set_num_threads(1)


def test_processes_are_combined_as_slots_that_share_the_cells():
    def one(fast, slow=None):
        arms = {"a": {"tokens_per_second": fast, "evaluation_seconds": 1.0, "build_seconds": 2.0}}
        arms |= {"b": {"tokens_per_second": slow, "evaluation_seconds": 3.0, "build_seconds": 0.0}} if slow else {}
        rest = {"import_seconds": fast, "first_seconds": 1.0, "base_mb": 400.0, "rows_seconds": 0.0}
        return {"arms": arms, **rest}

    found = probe.combine([one(100.0, 50.0), one(300.0, 50.0)], ["a", "b"], {"a": 1, "b": 1}, 0.2)
    assert found.speeds == {"a": Speed(150.0, 1.0, 2.0), "b": Speed(50.0, 3.0, 0.0)}  # harmonic mean
    assert (found.spread, found.import_seconds, found.processes) == (1.0, 200.0, 2)
    scaled = probe.combine([one(100.0)], ["a", "b"], {"a": 1, "b": 4}, 0.2)  # no time for b: four times the work
    assert scaled.speeds["b"] == Speed(25.0, 4.0, 2.0)


def test_processes_that_give_no_answer_in_time_are_ended():
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    quick = subprocess.Popen([sys.executable, "-c", "print('{}')"], **pipes)
    slow = [subprocess.Popen(sleep, **pipes) for _ in range(2)]
    with pytest.raises(ChildTimeout, match=r"^no answer within 1 s$"):
        answers(quick, *slow, limit=1.0)
    assert [process.returncode for process in slow] == [-9, -9]
    quick = subprocess.Popen([sys.executable, "-c", "print('{}')"], **pipes)
    assert answers(quick, limit=60.0) == [{}]


def test_a_calibration_without_an_end_is_one_line_that_names_another_way(tmp_path, monkeypatch, capsys):
    """The study is one that a plan calibrates, and every process is too slow."""
    monkeypatch.setenv("PAGATING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "LIMIT_SECONDS", 0.1)
    monkeypatch.setattr(child, "python_m", lambda module: [sys.executable, "-c", "import time; time.sleep(60)"])
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    text = {"corpus": {"files": {"train": "text.txt"}}, "tokenizer": {"vocab_size": 280}}
    (tmp_path / "slow.yaml").write_text(yaml_of(SMALL, **text))
    code, out, err = typed(monkeypatch, capsys, "plan", tmp_path / "slow.yaml", "--output", tmp_path)
    assert (code, out) == (1, "")
    announced, *_, said = err.splitlines()
    assert announced.startswith("calibrating: the first steps of 3 arms are trained here")
    assert said == (
        f"pagating: {tmp_path / 'slow.yaml'}: the calibration was ended: no answer within 0 s; this machine is too "
        "slow or too busy for it; --hours-from t4 needs none"
    )


@pytest.mark.slow
def test_a_calibration_trains_every_arm_in_as_many_processes_as_asked(tmp_path):
    corpus = plan.stand_in(tmp_path, 300, 1 << 14)
    study = study_of(SMALL)
    trials = {arm: plan.trial_spec(study, arm, sizes.example(study, arm), 1, corpus, test=False) for arm in study.arms}
    flops = {arm: model.flops_per_token for arm, model in models_of(study).items()}
    found = probe.probe(trials, flops, 2, 1.0)
    assert (set(found.speeds), found.processes) == (set(study.arms), 2)
    assert all(speed.tokens_per_second > 0 <= speed.build_seconds for speed in found.speeds.values())
    assert min(found.import_seconds, found.loop_seconds) > 0
    assert found.base_mb > 100
    broken = {arm: replace(trial, corpus=str(tmp_path / "none")) for arm, trial in trials.items()}
    with pytest.raises(ChildError, match=r"^FileNotFoundError"):
        probe.probe(broken, flops, 1, 1.0)
