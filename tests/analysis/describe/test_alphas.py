"""Start of the learned alphas, from the study's configuration, and their end."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from analysis.describe import alphas
from analysis.io.files import TableError
from analysis.io.study import load
from analysis.published import freeze
from analysis.report import takeaways
from pagating.gating.catalog import COMPETITORS

FINAL = {0: (0.45, 0.40, 0.55), 1: (1.55, 1.60, 1.77)}  # of layers 0 and 1, one value per seed
FIRST = {0: (0.60, 0.35, 0.52), 1: (1.64, 1.62, 1.60)}  # at the first evaluation, after some training


@pytest.fixture
def learned(tmp_path: Path) -> Path:
    """Write a study of a gate with one free alpha per layer, and of xSiLU, with the alphas above."""
    arms = {
        "gelu": {"baseline": True},
        "free": {"gate": "sigmoid", "alpha": {"learnable": {"init": 0.5, "per": "layer", "range": "free"}}},
        "xsilu": {"unit": "xsilu"},
    }
    trials, curves = [], []
    for arm in arms:
        for i, seed in enumerate((11, 12, 13)):
            start, end = (
                {f"alpha_layer_{k}": np.nan if arm == "gelu" else v[i] for k, v in at.items()} for at in (FIRST, FINAL)
            )
            trials.append({"stage": "confirm", "arm": arm, "seed": seed, "val_nll": 3.0 + 0.01 * i, "step": 20} | end)
            for step, at in ((10, start), (20, end)):
                curves.append(
                    {"stage": "confirm", "arm": arm, "seed": seed, "step": step, "tokens": step, "val_nll": 3.0} | at
                )
    pd.DataFrame(trials).to_parquet(tmp_path / "trials.parquet")
    pd.DataFrame(curves).to_parquet(tmp_path / "curves.parquet")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"name": "learned", "arms": arms}, sort_keys=False))
    return tmp_path


def test_the_start_is_the_configured_one_and_not_the_first_evaluation(learned: Path):
    rows = {(row["arm"], row["layer"]): row for row in alphas.summarise(load(learned))}
    assert list(rows) == [("free", 0), ("free", 1), ("xsilu", 0), ("xsilu", 1)]
    assert [row["start"] for row in rows.values()] == [0.5, 0.5, 0.0, 0.0]
    assert [row["first"] for row in rows.values()] == pytest.approx([0.49, 1.62, 0.49, 1.62])
    # against 0.5: one of 0.45, 0.40, 0.55 is above; all of 1.55, 1.60, 1.77 are, one of them above its own first value
    assert [(row["up"], row["down"]) for row in rows.values()] == [(1, 2), (3, 0), (3, 0), (3, 0)]
    assert rows["free", 1]["mean"] == pytest.approx(1.64)
    shown = alphas.columns(list(rows.values()))
    assert "start" in shown
    assert "first" not in shown


def test_tables_without_a_configuration_show_the_first_evaluation_by_its_name(learned: Path):
    study = load(learned)
    rows = alphas.summarise(replace(study, settings={}))
    assert [row["start"] for row in rows] == [None] * 4
    assert [(row["up"], row["down"]) for row in rows[:2]] == [(2, 1), (1, 2)]
    shown = alphas.columns(rows)
    assert shown["first"][0] == "at the first evaluation"
    assert "start" not in shown
    bare = alphas.summarise(replace(study, settings={}, curves=study.curves.iloc[:0]))
    assert [(row["first"], row["up"], row["down"]) for row in bare] == [(None, None, None)] * 4
    assert not {"start", "first"} & alphas.columns(bare).keys()


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"gate": "sigmoid", "alpha": "learnable"}, 0.5),
        ({"gate": "sigmoid", "alpha": {"learnable": None}}, 0.5),
        ({"gate": "sigmoid", "alpha": {"learnable": {"init": 0.25}}}, 0.25),
        ({"gate": "sigmoid", "alpha": {"token": {"init": 0.75}}}, 0.75),
        ({"unit": "xsilu", "alpha": {"learnable": {"init": 0.1}}}, 0.1),
        ({"unit": "swish"}, 1.0),
        ({"unit": "relu2"}, None),
        ({"gate": "sigmoid", "alpha": {"search": {"per": "layer", "uniform": [0.0, 1.0]}}}, None),
        ({"gate": "sigmoid", "alpha": 0.5}, None),
    ],
)
def test_the_start_of_every_kind(learned: Path, options: dict, start: float | None):
    study = load(learned)
    arms = study.settings["arms"] | {"free": options}
    assert alphas.start_of(replace(study, settings={"arms": arms}), "free") == start


def test_the_units_start_where_their_settings_do():
    learn = {
        name: row.settings["alpha"]["learnable"]["init"]
        for name, row in COMPETITORS.items()
        if isinstance(row.settings["alpha"], dict)
    }
    assert learn == alphas.UNIT_STARTS


@pytest.mark.parametrize(
    ("alpha", "words"),
    [({"learnable": 3}, r"arms\.free\.alpha\.learnable has 3"), ({"token": {"init": "a"}}, r"init 'a'; allowed: a nu")],
)
def test_a_configuration_that_is_none_is_refused(learned: Path, alpha: dict, words: str):
    study = load(learned)
    with pytest.raises(TableError, match=words):
        alphas.summarise(replace(study, settings={"arms": {"free": {"alpha": alpha}}}))


def test_one_alpha_of_all_layers_is_one_row_and_is_frozen_in_every_layer(learned: Path):
    study = load(learned)
    for seed, value in ((11, 0.9), (12, 0.8), (13, 1.0)):
        mine = (study.trials["arm"] == "free") & (study.trials["seed"] == seed)
        study.trials.loc[mine, ["alpha_layer_0", "alpha_layer_1"]] = value
    arms = study.settings["arms"] | {"free": {"gate": "sigmoid", "alpha": {"learnable": {"per": "model"}}}}
    study = replace(study, settings=study.settings | {"arms": arms})
    first, *others = alphas.summarise(study)
    assert (first["arm"], first["layer"], first["mean"]) == ("free", "all layers", pytest.approx(0.9))
    assert [row["layer"] for row in others] == [0, 1]
    assert freeze.pattern(study, "free") == [0.9, 0.9]
    assert takeaways.by_layer([first]) == "Mean alpha at the end: free at 0.90 in every layer."
    assert alphas.kinds([study]) == (
        "Learned alphas that were run: one in (0, 1) for all layers. Not run: one in (0, 1) per layer; one in (0, 1) "
        "per channel; a free one for all layers; a free one per layer; a free one per channel; one per token."
    )


def test_kinds_count_over_studies(learned: Path):
    one = load(learned)
    arms = {"a": {"alpha": {"token": None}}, "b": {"alpha": {"learnable": {"range": "free", "per": "channel"}}}}
    two = replace(one, arms=["a", "b"], settings={"arms": arms})
    assert alphas.kinds([one, two]).startswith(
        "Learned alphas that were run: a free one per layer; a free one per channel; one per token. Not"
    )
