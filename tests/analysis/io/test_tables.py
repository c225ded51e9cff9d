"""Tables that `load` refuses, each with its message, and the studies that it makes of valid ones."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from analysis.io.assemble import margin_in_nats
from analysis.io.files import TableError
from analysis.io.study import load


def change(folder: Path, **changes: object) -> Path:
    """Rewrite study.yaml with some keys changed."""
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))
    return folder


def edit(folder: Path, how: Callable[[pd.DataFrame], pd.DataFrame]) -> Path:
    """Rewrite trials.parquet."""
    how(pd.read_parquet(folder / "trials.parquet")).to_parquet(folder / "trials.parquet")
    return folder


def test_a_study_folder_is_read_as_its_file_says(demo: Path):
    study = load(demo)
    assert (study.baseline, study.floor, study.metric) == ("gelu", "linear-floor", "test_nll")
    assert (study.level, study.correction, study.margin) == (0.05, "holm", "0.5%")
    assert study.arms == ["gelu", "linear-floor", "paglu-searched", "paglu-per-layer"]
    assert study.losses().shape == (8, 4)
    rows = study.trials.query("stage == 'confirm' and arm == 'gelu'").set_index("seed")["test_nll"]
    assert np.array_equal(study.losses()["gelu"].to_numpy(), rows.sort_index().to_numpy())


def test_metric_defaults_to_the_test_loss_where_there_is_one(tmp_path: Path):
    table = pd.DataFrame({"arm": ["a", "b"], "seed": [1, 1], "val_nll": [2.0, 1.0], "test_nll": [np.nan] * 2})
    table.to_csv(tmp_path / "x.csv", index=False)
    assert load(tmp_path / "x.csv", baseline="a").metric == "val_nll"
    table.assign(test_nll=3.0).to_csv(tmp_path / "x.csv", index=False)
    assert load(tmp_path / "x.csv", baseline="a").metric == "test_nll"
    assert load(tmp_path / "x.csv", baseline="a", metric="val_nll").metric == "val_nll"
    with pytest.raises(TableError, match=r"no column 'nll' .* allowed: val_nll, test_nll"):
        load(tmp_path / "x.csv", baseline="a", metric="nll")


def test_two_baselines_or_none(demo: Path):
    with pytest.raises(TableError, match=r"2 arms are marked baseline: a, b; allowed: exactly one"):
        load(change(demo, arms={"a": {"baseline": True}, "b": {"baseline": True}}) and _only(demo, "a", "b"))
    with pytest.raises(TableError, match=r"no arm is marked baseline; allowed: exactly one"):
        load(change(demo, arms={"a": {}, "b": None}))


def _only(folder: Path, *names: str) -> Path:
    return edit(folder, lambda t: t.assign(arm=np.resize(names, len(t))))


def test_unknown_arm_stage_and_outcome(demo: Path):
    with pytest.raises(TableError, match=r"column outcome has 'ok'; allowed: completed, stopped_early"):
        load(edit(demo, lambda t: t.assign(outcome="ok")))
    with pytest.raises(TableError, match=r"column stage has 'test'; allowed: search, calibrate, confirm"):
        load(edit(demo, lambda t: t.assign(outcome="completed", stage="test")))
    with pytest.raises(TableError, match=r"column arm has 'other'; allowed: gelu, linear-floor"):
        load(edit(demo, lambda t: t.assign(stage="confirm", arm="other")))


def test_a_confirm_run_that_was_stopped_early_is_refused(demo: Path):
    def stop(t: pd.DataFrame) -> pd.DataFrame:
        t.loc[(t["stage"] == "confirm") & (t["seed"] == 103), "outcome"] = "stopped_early"
        return t

    with pytest.raises(TableError, match=r"stopped_early in the confirm stage \(gelu seed 103"):
        load(edit(demo, stop))


def test_selection_seeds_in_the_test_are_refused(demo: Path):
    with pytest.raises(TableError, match=r"confirm seeds 2 were used in search or calibrate"):
        load(edit(demo, lambda t: t.assign(seed=t["seed"].replace(102, 2))))


def test_duplicated_cells_are_refused_but_only_chosen_rows_count(demo: Path):
    twice = pd.read_parquet(demo / "trials.parquet")
    extra = twice[(twice["stage"] == "confirm") & (twice["seed"] == 101)]
    edit(demo, lambda t: pd.concat([t.assign(chosen=None), extra.assign(chosen=False, test_nll=9.0)]))
    assert load(demo).losses().max(axis=None) < 9
    edit(demo, lambda t: t.assign(chosen=True))
    with pytest.raises(TableError, match=r"duplicated confirm rows \(gelu seed 101"):
        load(demo)


def test_infeasible_is_kept_and_failed_is_no_run(demo: Path):
    def lose(t: pd.DataFrame) -> pd.DataFrame:
        t.loc[(t["stage"] == "confirm") & (t["seed"] == 103) & (t["arm"] == "gelu"), "outcome"] = "infeasible"
        t.loc[(t["stage"] == "confirm") & (t["seed"] == 104) & (t["arm"] == "gelu"), "outcome"] = "failed"
        return t

    losses = load(edit(demo, lose)).losses()["gelu"]
    assert losses[103] == np.inf
    assert np.isnan(losses[104])
    assert np.isfinite(losses.drop([103, 104])).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arm,loss\na,1\n", "column seed is missing; it has arm, loss"),
        ("arm,seed,loss\na,1,3.0\nb,1,abc\n", "column loss has 'abc'; allowed: numbers"),
        ("arm,seed,loss\na,1.5,3.0\n", "column seed has 1.5; allowed: whole numbers"),
        ("arm,seed,loss\na,x,3.0\na,1,3.0\n", "column seed has '1' and 'x'; allowed: all numbers, or all names"),
        ("arm,seed,loss\na,,3.0\n", "column seed is empty in row 1"),
        ("arm,seed,loss,other\na,1,3.0,2\n", "which column is the metric"),
        ("arm,seed,loss\na,1,-inf\n", "column loss has -inf"),
        ("arm,seed,loss\n", "has no rows"),
        ("", "cannot be read as a table"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, message: str):
    file = tmp_path / "runs.csv"
    file.write_text(text)
    with pytest.raises(TableError, match=message) as error:
        load(file, baseline="a")
    assert "\n" not in str(error.value)
    assert "runs.csv" in str(error.value)


def test_a_study_folder_keeps_its_own_rule(demo: Path):
    with pytest.raises(TableError, match=r"--level 0.1: .* fixed it before the study ran"):
        load(demo, level=0.1)


def test_bad_settings(demo: Path):
    for confirm, message in (
        ({"level": 5}, "level 5; allowed: a number above 0 and below 0.5"),
        ({"correction": "sidak"}, "correction 'sidak'; allowed: holm"),
        ({"margin": "-1%"}, "margin '-1%'; allowed: nats above 0"),
    ):
        with pytest.raises(TableError, match=message):
            load(change(demo, confirm=confirm))
    (demo / "study.yaml").write_text("a: [1")
    with pytest.raises(TableError, match="not YAML"):
        load(demo)


def test_margin():
    assert margin_in_nats("0.5%", 3.2) == pytest.approx(0.016)
    assert margin_in_nats(0.02, 3.2) == 0.02
    for bad in ("half", True, 0, "nan%"):
        with pytest.raises(TableError, match="allowed: nats above 0, or a percentage"):
            margin_in_nats(bad, 3.2)
