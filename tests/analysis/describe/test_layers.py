"""Tests of what a report says of the layers of kept models: means, ratios, sentences, gaps and refused tables."""

import numpy as np
import pandas as pd
import pytest

from analysis.describe.layers import ARM_COLUMNS, by_arm, by_layer, without_model
from analysis.io.files import TableError
from analysis.io.study import load
from analysis.report import build
from analysis.report.findings import Findings
from analysis.report.layers import layers, takeaway
from tests.analysis.helpers import simulate

BASE = {"negative_slope": 0.25, "dead": 0.0, "gradient_passed": 0.5, "width": 64}
ROWS = [
    {"arm": arm, "seed": seed, "layer": layer, **BASE, "gradient_norm": norm, "hidden_rank": rank, "openness": openness}
    for arm, seed, layer, norm, rank, openness in (
        ("gelu", 101, 1, 2.0, 40.0, 0.5),
        ("gelu", 101, 0, 1.0, 20.0, 0.5),
        ("paglu-per-layer", 102, 0, 4.0, 10.0, 0.5),
        ("paglu-per-layer", 102, 1, 2.0, 20.0, 0.7),
        ("paglu-searched", 103, 0, np.nan, 20.4, 0.5),
        ("paglu-searched", 103, 1, 1.0, 40.0, np.inf),
    )
]
SENTENCES = (
    "Mean share of its input that the activation lets through: gelu 0.50, paglu-searched 0.50, paglu-per-layer 0.60. "
    "The gradient at the hidden layer, against gelu: larger for paglu-per-layer (2.00 times); smaller for "
    "paglu-searched (0.50 times). The effective rank of the hidden layer, against gelu (mean 30 of 64): smaller for "
    "paglu-per-layer (0.50 times); about equal for paglu-searched (1.01 times)."
)


def written(folder, rows):
    """Write a simulated study with a table of layers."""
    simulate(folder)
    pd.DataFrame(rows).to_parquet(folder / "layers.parquet", index=False)
    return folder


def test_means_and_ratios_to_the_baseline(tmp_path):
    study = load(written(tmp_path, ROWS))
    rows = by_layer(study)
    assert [(row["arm"], row["layer"]) for row in rows[:4]] == [
        *(("gelu", 0), ("gelu", 1), ("paglu-searched", 0), ("paglu-searched", 1))
    ]
    assert (rows[2]["gradient_norm"], rows[3]["openness"], rows[3]["alpha"]) == (None, None, None)
    assert rows[3]["width"] == 64
    gelu, searched, learned = by_arm(rows, "gelu")
    assert set(ARM_COLUMNS) == set(gelu)
    assert (gelu["gradient_ratio"], gelu["rank_ratio"], gelu["hidden_rank"]) == (1.0, 1.0, 30.0)
    assert learned["gradient_ratio"] == pytest.approx(2.0)  # geometric mean of 4 and 1
    assert learned["rank_ratio"] == pytest.approx(0.5)
    assert learned["openness"] == pytest.approx(0.6)
    assert searched["gradient_ratio"] == 0.5  # of the layer that has both
    assert searched["rank_ratio"] == pytest.approx(np.sqrt(1.02))
    assert without_model(study, rows) == ["linear-floor"]
    assert takeaway(by_arm(rows, "gelu"), "gelu") == SENTENCES


def test_without_the_baselines_model_no_ratio_is_said(tmp_path):
    rows = by_layer(load(written(tmp_path, ROWS[2:])))
    assert {row["gradient_ratio"] for row in by_arm(rows, "gelu")} == {None}
    assert takeaway(by_arm(rows, "gelu"), "gelu") == ""


def test_the_report_has_the_section(tmp_path):
    folder = written(tmp_path, ROWS)
    build.build(folder)
    page = (folder / "report.html").read_text()
    assert SENTENCES in page
    assert "No model was kept and measured of linear-floor." in page
    assert (folder / "figures" / "layers.svg").read_text().count("effective rank") == 1
    assert len(pd.read_csv(folder / "tables" / "layers.csv")) == len(ROWS)
    assert pd.read_csv(folder / "tables" / "why.csv")["arm"].tolist() == ["gelu", "paglu-searched", "paglu-per-layer"]


@pytest.mark.parametrize(
    ("count", "ticks"), [(1, [0]), (8, [*range(8)]), (12, [*range(0, 12, 2)]), (48, [*range(0, 48, 6)])]
)
def test_only_numbers_of_layers_are_on_the_axis(tmp_path, count, ticks):
    found = Findings(load(written(tmp_path, [ROWS[0] | {"layer": layer} for layer in range(count)])))
    assert [ax.get_xticks().tolist() for ax in layers(found.study, found.layers).axes] == [ticks] * 4


def test_a_model_of_nan_is_drawn_as_nothing(tmp_path):
    empty = dict.fromkeys(ROWS[0], np.nan) | {"arm": "paglu-searched", "seed": 103, "layer": 0}
    found = Findings(load(written(tmp_path, [*ROWS[:2], empty])))
    panels = layers(found.study, found.layers).axes
    assert [[len(line.get_xdata()) for line in ax.lines] for ax in panels] == [[2, 0]] * 4
    assert found.why[1]["openness"] is None
    assert takeaway(found.why, "gelu").startswith(
        "Mean share of its input that the activation lets through: gelu 0.50."
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"arm": "gelu", "seed": 1}], "layers.parquet: column layer is missing; it has arm, seed"),
        ([{"arm": "x", "seed": 1, "layer": 0}], "layers.parquet: column arm has 'x'; allowed: gelu, "),
        ([{"arm": "gelu", "seed": 1, "layer": "a"}], "column layer has 'a'; allowed: numbers"),
        ([{"arm": "gelu", "seed": 1, "layer": None}], "column layer has nan; allowed: whole numbers"),
        ([{"arm": "gelu", "seed": 1, "layer": 0, "dead": "many"}], "column dead has 'many'; allowed: numbers"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused_in_a_line(tmp_path, rows, said):
    with pytest.raises(TableError) as error:
        by_layer(load(written(tmp_path, rows)))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
