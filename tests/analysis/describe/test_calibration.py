"""The learning-rate grid in the verdict and in the report: optima, edges, the table at equal learning rate."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from analysis.describe import calibration
from analysis.describe.calibration import at_grid
from analysis.io.study import load
from analysis.report import build
from analysis.verdict.decide import verdict


def test_each_arm_has_its_optimum_by_both_rules(demo: Path):
    rows = calibration.optimum_rows(load(demo))
    assert [row["arm"] for row in rows] == ["gelu", "linear-floor", "paglu-searched", "paglu-per-layer"]
    trials = pd.read_parquet(demo / "trials.parquet")
    means_of_logs = float(np.mean([math.log(row["own"]) for row in rows]))
    for row in rows:
        grid = trials[(trials["stage"] == "calibrate") & (trials["arm"] == row["arm"])]
        means = grid.groupby("lr")["val_nll"].mean()
        assert row["grid_best"] == means.idxmin()
        c, b, _ = np.polyfit(np.log(means.index), means, 2)  # three points, all of weight 1
        # se(c) of three equally spaced points is s sqrt(3 / 2) / h^2
        steadied = c + row["standard_error"] * math.sqrt(1.5) / math.log(2) ** 2 / 2
        centre = np.log(means.index).to_numpy().mean()
        assert row["own"] == pytest.approx(math.exp(centre - (b + 2 * c * centre) / (2 * steadied)))
        away = [abs(math.log(row[kind]) - means_of_logs) for kind in ("fitted", "own")]
        assert away[0] < away[1]  # towards the other arms
        assert (row["chosen"], row["points"], row["infeasible"], row["at_edge"]) == (2e-3, 3, 0, "no")


def test_an_optimum_at_the_end_of_the_grid_is_said_in_the_verdict(demo: Path):
    assert "Warning" not in verdict(load(demo))["summary"]
    trials = pd.read_parquet(demo / "trials.parquet")
    cut = (trials["stage"] == "calibrate") & (trials["arm"] == "paglu-searched") & (trials["lr"] > 3e-3)
    trials[~cut].to_parquet(demo / "trials.parquet")
    result = verdict(load(demo))
    by_arm = {row["arm"]: row for row in result["comparisons"]}
    assert by_arm["paglu-searched"]["at_edge"] == ["paglu-searched"]
    assert by_arm["paglu-per-layer"]["at_edge"] == []
    assert "the learning rate of paglu-searched is an end of the calibration grid" in by_arm["paglu-searched"]["why"]
    assert result["summary"].endswith(" Warning: the learning rate of paglu-searched is an end of the grid.")


def test_equal_learning_rates_as_one_table(demo: Path):
    rows = at_grid(load(demo))
    table, columns = calibration.pivot(rows)
    assert [heading for heading, _ in columns.values()] == ["arm", "0.001", "0.002", "0.004"]
    assert [row["arm"] for row in table] == ["linear-floor", "paglu-searched", "paglu-per-layer"]
    one = next(row for row in rows if row["arm"] == "paglu-searched" and row["lr"] == 2e-3)
    assert table[1]["0.002"].startswith(f"{one['improvement_percent']:+.2f}% [{one['improvement_low']:+.2f}, ")
    assert calibration.pivot([]) == ([], {"arm": ("arm", "")})


def test_the_report_shows_how_seeds_were_added(demo: Path):
    settings = yaml.safe_load((demo / "study.yaml").read_text())
    settings["confirm"] = {"rule": "obrien-fleming", "level": 0.05, "correction": "holm", "margin": "0.5%"}
    (demo / "study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    build.build(demo)
    result = json.loads((demo / "verdict.json").read_text())
    path = pd.read_csv(demo / "tables" / "sequential.csv")
    assert path.groupby("arm")["n"].apply(list).to_dict() == {arm: [3, 5, 8] for arm in path["arm"]}  # 8 seeds ran
    for row in result["comparisons"]:
        assert row["p_anytime"] == pytest.approx(path[path["arm"] == row["arm"]]["p_anytime"].iloc[-1])
    text = (demo / "report.html").read_text()
    assert "How seeds were added" in text
    assert "fresh seeds added by the rule obrien-fleming, with looks at 3, 5, 8, 10 seeds" in text
    assert "(p over all looks of the rule obrien-fleming; the interval is that of the look" in text
    open_arms = [row["arm"] for row in result["comparisons"] if row["verdict"].startswith("undecided")]
    assert all(f"{arm}: its next look is at 10 seeds." in text for arm in open_arms)
    assert "a claim asks for" not in text
    drawn = (demo / "figures" / "sequential.svg").read_text()
    assert ">0.01<" in drawn
    assert "mathdefault" not in drawn  # the formula of a power of ten, of which no figure is read
    assert "at the level of its last look" in text
    assert (demo / "tables" / "calibration.csv").exists()
