"""A whole study of the user's own training, from its file to its report."""

import json
from pathlib import Path

import pandas as pd
import pytest

from analysis.describe.curves import over_training
from analysis.io.study import load as load_tables
from analysis.report.build import build
from analysis.stats.trend import budget_factor
from analysis.verdict.decide import decide
from tests.own_trainings import FUNCTION, own_study
from tune.backend.inline import Inline
from tune.cli.status_table import as_object, look
from tune.errors import StudyError, StudyStopped
from tune.run import ledger
from tune.run.tables import write_tables
from tune.study.files import find, load
from tune.sweep import sweep

ROOT = Path(__file__).parents[2]
OF_BUILT_IN = ("val_nll", "test_nll", "nats", "tokens", "GPT", "activation", "linear MLP", "per token")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a finished study whose metric is better if it is higher, with its report."""
    base = tmp_path_factory.mktemp("own")
    upside = FUNCTION.replace(
        "loss = 2 + off + 20 / step - trial.shift + noise", "loss = 9 - off - 20 / step + trial.shift - noise"
    )
    names = {"name": "val_score", "test": "test_score", "goal": "maximize", "unit": "points"}
    study = own_study(base, upside.replace("_loss", "_score"), metric=names, budget={"steps": None, "epochs": 40})
    run = sweep(study, base, base / "studies", Inline())
    assert run.stages.finished
    build(run.folder)
    return base, run.folder


def test_tables_have_the_users_names_and_sign(finished):
    _, folder = finished
    trials, curves = (pd.read_parquet(folder / f"{name}.parquet") for name in ("trials", "curves"))
    assert {"val_score", "test_score", "epochs", "epochs_per_second", "lr", "seconds", "peak_rss_mb"} <= set(trials)
    assert not {"val_nll", "test_nll", "tokens", "steps", "alpha", "parameters"} & set(trials)
    assert not {"val_nll", "tokens"} & set(curves)
    confirm = trials[trials["stage"] == "confirm"]
    assert (confirm["test_score"] > 5).all()
    assert trials.loc[trials["stage"] != "confirm", "test_score"].isna().all()
    assert dict(confirm.groupby("arm")["epochs"].max()) == {"plain": 40, "shifted": 40, "short": 20}


def test_verdict_is_that_of_the_users_metric(finished):
    _, folder = finished
    study = load_tables(folder)
    result = decide(study)
    rows = {row.arm: row for row in result.comparisons}
    assert (rows["shifted"].verdict, rows["short"].verdict) == ("better", "worse")
    trials = pd.read_parquet(folder / "trials.parquet")
    means = trials[trials["stage"] == "confirm"].groupby("arm")["test_score"].mean()
    assert rows["shifted"].arm_mean == pytest.approx(means["shifted"])
    expected = 100 * (means["shifted"] / means["plain"] - 1)
    assert rows["shifted"].improvement_percent == pytest.approx(expected)
    assert rows["shifted"].improvement_low < expected < rows["shifted"].improvement_high
    assert "on test_score (higher is better)" in result.summary
    assert "The floor short loses by" in result.summary
    assert " points" in result.summary


def test_files_for_readers_speak_of_the_users_metric_only(finished):
    _, folder = finished
    page = (folder / "report.html").read_text(encoding="utf-8")
    verdict = (folder / "verdict.md").read_text(encoding="utf-8")
    tables = "".join(path.read_text(encoding="utf-8") for path in (folder / "tables").glob("*.tex"))
    for text in (page, verdict, tables):
        assert [word for word in OF_BUILT_IN if word in text] == []
    assert "training epochs" in page
    assert "val_score (points)" in page
    assert "-val_score" not in page
    known = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    assert sorted(known["code"]) == ["mine.py", "noise.py"]
    assert known["formulas"] == {"plain": "shift=0.0", "shifted": "shift=0.1", "short": "shift=0.0"}


def test_over_training_the_sign_is_that_of_an_improvement(finished):
    _, folder = finished
    shifted = over_training(load_tables(folder))["shifted"]
    assert (shifted["improvement_percent"] > 0).all()
    assert (shifted["low"] < shifted["improvement_percent"]).all()
    assert (shifted["improvement_percent"] < shifted["high"]).all()


def test_a_finished_study_goes_on_from_its_folder_and_refuses_changed_files(finished):
    base, folder = finished
    before = ledger.read(folder / "ledger.jsonl")
    found = find(folder, base / "studies")
    run = sweep(found.study, found.base, found.output, Inline())
    assert run.stages.finished
    assert len(ledger.read(folder / "ledger.jsonl")) == len(before)
    source = (base / "noise.py").read_text()
    (base / "noise.py").write_text("SIZE = 0.5\n")
    with pytest.raises(StudyError, match=r"noise\.py has changed since the study began"):
        sweep(load(base / "own.yaml"), base, base / "studies", Inline())
    (base / "noise.py").write_text(source)


@pytest.mark.parametrize("compute", [True, False])
def test_a_ladder_of_sizes_has_a_trend(tmp_path, compute):
    grows = "- trial.shift * math.log2(trial.width / 4) +"
    rows = [{"width": 4 * 2**n, "budget": 20 * n, **({"compute": 4.0**n} if compute else {})} for n in (1, 2, 3)]
    function = FUNCTION.replace("- trial.shift +", grows)
    study = own_study(tmp_path, function, scales=rows, arms={"short": None}, confirm={"seeds": 3})
    run = sweep(study, tmp_path, tmp_path / "studies", Inline())
    assert run.stages.finished
    result = decide(load_tables(run.folder))
    (trend,) = result.trends
    value = [rung.result.comparisons[0].improvement_percent for rung in result.rungs]
    assert value == sorted(value)
    per_rung = (value[2] - value[0]) / 2  # the slope of three points at equal distances
    assert trend.slope == pytest.approx(per_rung / 2 if compute else per_rung)
    assert trend.said.endswith("points per doubling of compute" if compute else "points per rung")
    assert [rung.compute for rung in result.rungs] == ([4.0, 16.0, 64.0] if compute else [None] * 3)
    trials = pd.read_parquet(run.folder / "trials.parquet")
    assert dict(trials.groupby("rung")["steps"].max()) == {1: 20, 2: 40, 3: 60}


def test_splits_of_one_data_set_are_decided_with_the_corrected_variance(tmp_path):
    shares = {"test_share": 0.2, "train_share": 0.6}
    run = sweep(own_study(tmp_path, resampling=shares), tmp_path, tmp_path / "studies", Inline())
    study = load_tables(run.folder)
    d = study.losses()[["plain", "shifted"]].to_numpy() @ [1, -1]
    row = next(row for row in decide(study).comparisons if row.arm == "shifted")
    assert row.t == pytest.approx(d.mean() / (d.std(ddof=1) * (1 / 4 + 1 / 3) ** 0.5))
    assert "(1/n + 0.333) s^2" in row.why
    b, a, short = study.losses()[["plain", "shifted", "short"]].to_numpy().T
    worth = budget_factor(b, a, short, 0.5, 0.05, 1 / 3)
    assert f"{100 * (worth.low - 1):.1f}, {100 * (worth.high - 1):.1f}]" in row.why
    bare = load_tables(run.folder / "trials.parquet", baseline="plain", metric="test_loss")
    assert next(each for each in decide(bare).comparisons if each.arm == "shifted").p_t == row.p_t
    build(run.folder)
    assert "paired t test over splits" in (run.folder / "report.html").read_text(encoding="utf-8")
    more = own_study(tmp_path, resampling=shares, confirm={"seeds": 6})
    with pytest.raises(StudyError, match=r"confirm.seeds was 4 and is now 6; .* known for one look"):
        sweep(more, tmp_path, tmp_path / "studies", Inline())


def test_a_last_stage_in_which_each_trial_of_an_arm_fails_stops_with_the_reason(tmp_path):
    """Return nothing in the last stage of one arm: the study has no verdict, and the same call tries again."""
    silent = FUNCTION.replace("if trial.test else", "if trial.test and not trial.shift else")
    short = {"search": {"trials_per_arm": 1}, "stages": ["search", "confirm"], "calibrate": None}
    study = own_study(tmp_path, silent, arms={"short": None}, confirm={"seeds": 2}, **short)
    reason = "the function did not return test_loss although trial.test is true"
    for attempts in (1, 2):
        with pytest.raises(StudyStopped) as stopped:
            sweep(study, tmp_path, tmp_path / "studies", Inline())
        folder = tmp_path / "studies" / "own"
        ended = [event for event in ledger.read(folder / "ledger.jsonl") if event["event"] == "ended"]
        failed = [event["cell"] for event in ended if event["outcome"] == "failed"]
        assert len(failed) == 2 * 3 * attempts
        assert str(stopped.value) == (
            f"the study stopped: each confirm trial of shifted failed again and again, {failed[0]}: {reason}; "
            "the same command tries them again"
        )
    view = look(study, folder)
    assert f"Failed:  {failed[-1]}: {reason}" in view.lines
    assert view.note.startswith("It is not running")
    assert as_object(view)["failure"] == {"cell": failed[-1], "reason": reason}
    write_tables("own", ledger.read(folder / "ledger.jsonl"), folder, study)
    result = decide(load_tables(folder))
    assert result.unfinished == f"each confirm trial of shifted failed, the first one: {reason}"
    assert {row.verdict for row in result.comparisons} == {"unfinished"}
    assert reason in result.summary


def test_a_last_stage_that_loses_one_seed_of_an_arm_goes_on(tmp_path):
    """Return nothing in the last stage of one seed: the verdict is that of the others."""
    silent = FUNCTION.replace("if trial.test else", "if trial.test and trial.seed != 102 else")
    short = {"search": {"trials_per_arm": 1}, "stages": ["search", "confirm"], "calibrate": None}
    study = own_study(tmp_path, silent, arms={"short": None}, confirm={"seeds": 3}, **short)
    run = sweep(study, tmp_path, tmp_path / "studies", Inline())
    result = decide(load_tables(run.folder))
    assert (run.stages.finished, result.unfinished, result.comparisons[0].n) == (True, "", 2)
