"""Tests of the check of the user's own training."""

import sys

import pytest

from tests.own_trainings import FUNCTION, own_study
from tests.tune.helpers import typed
from tune.subject.check import Grade, check

DRAW = 'random.Random(f"{trial.seed}/{trial.shift}/{trial.budget}")'
SABOTAGE = {
    "ignores the seed": (FUNCTION.replace(DRAW, "random.Random(1)"), "another seed", "the seed is not used"),
    "ignores the arm's setting": (
        FUNCTION.replace(DRAW, "random.Random(trial.seed)").replace("- trial.shift", "- 0 * trial.shift"),
        "settings of shifted", "gives the bits of plain"),
    "never reads the setting": (
        FUNCTION.replace(DRAW, "random.Random(trial.seed)").replace("- trial.shift", ""),
        "arm shifted trains", "arms.shifted: the function never reads trial.shift"),
    "unseeded data order": (FUNCTION.replace(DRAW, "random.Random()"), "the same seed again", "unseeded (val_loss"),
    "shared output file": (FUNCTION.replace("    off =", "    open('best.txt', 'a').write('x')\n    off ="),
        "files of trials", "trials wrote best.txt in"),
    "no test metric": (FUNCTION.replace("if trial.test", "if False"), "the last stage", "did not return test_loss"),
    "wrong budget": (FUNCTION.replace("trial.budget + 1", "trial.budget - 1"), "arm plain trains", "of 40 steps"),
}  # fmt: skip


def test_a_good_training_passes(tmp_path):
    found = list(check(own_study(tmp_path), tmp_path, 1.0))
    assert [str(finding) for finding in found if not finding.passed] == []
    said = {finding.what: finding.said for finding in found}
    assert said["the same seed again"] == Grade.SAME_BITS
    assert list(said)[:3] == ["arm plain trains", "arm shifted trains", "arm short trains"]
    assert "settings of short" not in said  # it is the baseline with less training


def test_short_trials_end_at_a_report_of_the_lowest_size(tmp_path):
    rows = [{"width": width, "budget": budget} for width, budget in ((2, 80), (4, 160))]
    sized = FUNCTION.replace("- trial.shift", "- trial.shift / trial.width")
    changes = {"arms": {"short": {"of": "plain", "budget": 0.7}}}  # 5.6 of 56 steps, and a report every 10
    found = list(check(own_study(tmp_path, sized, scales=rows, **changes), tmp_path, 0.1))
    assert [str(finding) for finding in found if not finding.passed] == []
    wrong = sized.replace("trial.budget + 1", "trial.budget - 1")
    first = next(check(own_study(tmp_path, wrong, scales=rows, **changes), tmp_path, 0.1))
    assert (first.passed, "of 10 steps" in first.said) == (False, True)


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_training_that_would_spoil_the_verdict_is_refused(tmp_path, name):
    function, what, said = SABOTAGE[name]
    found = {finding.what: finding for finding in check(own_study(tmp_path, function), tmp_path, 1.0)}
    assert found[what].passed is False
    assert said in found[what].said
    assert "\n" not in str(found[what])


def test_noise_below_that_of_a_seed_is_a_grade(tmp_path):
    tiny = FUNCTION.replace("        trial.report", "        loss += 1e-6 * random.random()\n        trial.report")
    found = {finding.what: finding for finding in check(own_study(tmp_path, tiny), tmp_path, 1.0)}
    assert found["the same seed again"].passed
    assert found["the same seed again"].said.startswith(Grade.WITHIN_NOISE)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the memory of a process at any time")
def test_memory_that_grows_is_noted(tmp_path):
    leak = FUNCTION.replace("        trial.report", "        KEPT.append(b'x' * (60 << 20))\n        trial.report")
    found = {finding.what: finding for finding in check(own_study(tmp_path, "KEPT = []\n" + leak), tmp_path, 1.0)}
    assert found["memory"].passed is None
    assert "it grew by 1" in found["memory"].said  # two of the four pieces


def test_the_command_exits_with_2_if_something_is_refused(tmp_path, monkeypatch, capsys):
    own_study(tmp_path)
    code, out, _ = typed(monkeypatch, capsys, "check", tmp_path / "own.yaml", "--share", "0.5")
    assert (code, out.splitlines()[0].split()[:4]) == (0, ["ok", "arm", "plain", "trains:"])
    (tmp_path / "mine.py").write_text(SABOTAGE["ignores the seed"][0])
    code, out, _ = typed(monkeypatch, capsys, "check", tmp_path / "own.yaml", "--share", "0.5")
    assert code == 2
    assert "REFUSED another seed: gives the same bits: the seed is not used" in out.splitlines()
