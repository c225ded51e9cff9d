"""Tests of the check of the user's own training."""

import json
import sys

import pytest

from analysis.io.study import load
from analysis.report.findings import Findings
from analysis.report.methods import caveat, methods, would_change
from tests.own_trainings import FUNCTION, own_study
from tests.tune.helpers import typed
from tune.backend.inline import Inline
from tune.run import ledger
from tune.run.provenance import renew_check
from tune.subject.check import Grade, check
from tune.sweep import sweep

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
    monkeypatch.chdir(tmp_path)
    own_study(tmp_path)
    code, out, _ = typed(monkeypatch, capsys, "check", tmp_path / "own.yaml", "--share", "0.5")
    assert (code, out.splitlines()[0].split()[:4]) == (0, ["ok", "arm", "plain", "trains:"])
    (tmp_path / "mine.py").write_text(SABOTAGE["ignores the seed"][0])
    code, out, _ = typed(monkeypatch, capsys, "check", tmp_path / "own.yaml", "--share", "0.5")
    assert code == 2
    assert "REFUSED another seed: gives the same bits: the seed is not used" in out.splitlines()


RESUMES = FUNCTION.replace("    off =", "    kept = trial.folder / 'step'\n    off =").replace(
    "    for step in range(10,",
    "    begun = int(kept.read_text()) if kept.exists() else 0\n    for step in range(10 + begun,",
)


def test_a_stopped_trial_goes_on_or_starts_anew(tmp_path):
    def said(function):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return {each.what: each for each in check(own_study(folder, function), folder, 1.0)}["a stopped trial"]

    assert said(FUNCTION).said == "starts anew: the same bits"
    by_step = 'random.Random(f"{trial.seed}/{trial.shift}/{step}").random()'
    resumes = RESUMES.replace("        trial.report", "        open(kept, 'w').write(str(step))\n        trial.report")
    same = said(resumes.replace("draw.random()", by_step))
    assert (same.passed, same.said) == (True, "goes on after step 10: the same bits")
    other = said(resumes)  # its generator begins again
    assert (other.passed, other.said.partition(":")[0]) == (False, "goes on after step 10")
    assert said(FUNCTION.replace("range(10,", "range(40,")).said == "has to start anew: the only report is at its end"


def test_what_was_found_is_in_provenance_report_and_store(tmp_path, monkeypatch, capsys):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    study = own_study(tmp_path, confirm={"seeds": 2})
    folder, uri = tmp_path / "studies/own", f"sqlite:///{tmp_path / 'mlflow.db'}"
    said = []
    sweep(study, tmp_path, tmp_path / "studies", Inline(), tracking_uri=uri, warn=said.append)
    assert [line for line in said if line.startswith("not checked: `pagating check`")] != []

    def stated():
        renew_check(folder, ledger.read(folder / "ledger.jsonl"))
        known = json.loads((folder / "provenance.json").read_text())["check"]
        found = Findings(load(folder))
        return known["grade"], " ".join([*methods(found.study), *would_change(found)])

    grade, page = stated()
    assert grade == "not checked"
    assert caveat(load(folder)).startswith("Check of the training: not checked; ")
    assert "was not run on these files, so nothing shows that seeds act" in page
    assert typed(monkeypatch, capsys, "check", "own.yaml", "--share", "0.5")[0] == 0
    assert typed(monkeypatch, capsys, "report", "own")[0] == 0
    assert "trained again gives the same bits" in (folder / "report.html").read_text()
    grade, page = stated()
    assert grade == "same bits"
    assert caveat(load(folder)) == ""
    assert "Check of the training: same bits; a trial that is trained again gives the same bits." in page
    assert "was not run on these files" not in page
    client = MlflowClient(uri)
    (parent,) = client.search_runs([each.experiment_id for each in client.search_experiments()], "tags.stage = 'study'")
    assert parent.data.tags["check"] == "not checked"
    assert typed(monkeypatch, capsys, "sync", "own", "--tracking", uri)[0] == 0
    assert client.get_run(parent.info.run_id).data.tags["check"] == "same bits"
    kept = folder / "check.json"
    kept.write_text(kept.read_text().replace('"refused": []', '"refused": ["another seed: gives the same bits"]'))
    assert "the check of it refused it (another seed: gives the same bits)" in stated()[1]
    kept.write_text(kept.read_text().replace('"mine.py": "', '"mine.py": "0'))  # of another file
    assert stated()[0] == "not checked"


def test_a_check_before_the_study_begins_leaves_it_free_to_begin(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    study = own_study(tmp_path, stages=["search"], search={"trials_per_arm": 1})
    assert typed(monkeypatch, capsys, "check", "own.yaml", "--share", "0.5")[0] == 0
    said = []
    run = sweep(study, tmp_path, tmp_path / "studies", Inline(), warn=said.append)
    assert [line for line in said if "check" in line] == []
    assert json.loads((run.folder / "provenance.json").read_text())["check"] == {
        "grade": "same bits", "refused": [], "share": 0.5
    }  # fmt: skip
    assert typed(monkeypatch, capsys, "rm", "own", "--yes")[0] == 0
    assert not run.folder.exists()
