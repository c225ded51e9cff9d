"""Importance and the loss against alpha, on search trials with known losses."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import yaml

from analysis import budget, improvement
from analysis.describe import hyperparameters
from analysis.io.study import load
from analysis.published import claims
from analysis.report import build

ARM = "paglu-searched"


@pytest.fixture
def searched(demo: Path) -> Path:
    """Give the demo 24 search trials of one arm: a parabola in alpha around 1.2, little effect of the rate."""
    trials = pd.read_parquet(demo / "trials.parquet")
    rng = np.random.default_rng(4)
    row = trials[(trials["stage"] == "confirm") & (trials["arm"] == ARM)].iloc[0]
    new = pd.DataFrame([row] * 24).assign(stage="search", seed=1, config_key=[f"n{i}" for i in range(24)])
    new["alpha"], new["lr"] = rng.uniform(0, 2, 24), 10 ** rng.uniform(-4, -2, 24)
    noise = rng.normal(0, 0.002, 24)
    new["val_nll"] = 3.2 + 0.1 * (new["alpha"] - 1.2) ** 2 + 0.001 * np.log(new["lr"] / 2e-3) ** 2 + noise
    keep = trials[(trials["stage"] != "search") | (trials["arm"] != ARM)]
    pd.concat([keep, new]).to_parquet(demo / "trials.parquet")
    settings = yaml.safe_load((demo / "study.yaml").read_text())
    settings["nuisance"] = {"lr": {"loguniform": [1e-4, 1e-2]}}
    (demo / "study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return demo


def test_alpha_is_found_to_matter_and_its_arm_alone_is_listed(searched: Path):
    rows = hyperparameters.importance(load(searched))
    assert {row["arm"] for row in rows} == {ARM}
    shares = {row["hyperparameter"]: row["importance"] for row in rows}
    assert set(shares) == {"lr", "alpha"}
    assert shares["alpha"] > 0.7
    assert sum(shares.values()) == pytest.approx(1)


def test_the_curve_over_alpha_is_that_of_least_squares(searched: Path):
    study = load(searched)
    rows = pd.DataFrame(hyperparameters.against_alpha(study))
    trials = hyperparameters.completed(study, ARM)
    x = np.log(trials["lr"].to_numpy()) - np.log(trials["lr"]).mean()
    fit = sm.OLS(trials["val_nll"], hyperparameters._design(trials["alpha"].to_numpy(), x)).fit()
    best = np.linspace(x.min(), x.max(), 101)
    best = best[np.argmin(fit.params.iloc[3] * best + fit.params.iloc[4] * best**2)]
    at = hyperparameters._design(rows["alpha"].to_numpy(), np.full(len(rows), best))
    expected = fit.get_prediction(at).summary_frame(alpha=0.05)
    np.testing.assert_allclose(rows["loss"], expected["mean"])
    np.testing.assert_allclose(rows["low"], expected["mean_ci_lower"])
    np.testing.assert_allclose(rows["high"], expected["mean_ci_upper"])
    assert rows.loc[rows["loss"].idxmin(), "alpha"] == pytest.approx(1.2, abs=0.1)


def test_few_trials_give_neither(demo: Path):
    assert hyperparameters.importance(load(demo)) == hyperparameters.against_alpha(load(demo)) == []


def test_the_report_has_both(searched: Path):
    build.build(searched)
    assert "What mattered in the search" in (searched / "report.html").read_text()
    assert (searched / "figures" / "against_alpha.svg").exists()
    assert pd.read_csv(searched / "tables" / "importance.csv")["arm"].unique().tolist() == [ARM]


def test_claims_show_what_counting_the_padding_makes_of_it(demo: Path):
    assert {row["id"]: row["study demo"] for row in claims.table(load(demo))}["padding"] is None
    trials = pd.read_parquet(demo / "trials.parquet")
    trials["padded_nll"] = 0.4 * trials["val_nll"]
    trials.to_parquet(demo / "trials.parquet")
    text = {row["id"]: row["study demo"] for row in claims.table(load(demo))}["padding"]
    base = trials[(trials["stage"] == "confirm") & (trials["arm"] == "gelu")]["val_nll"].mean()
    assert text.startswith(f"on val_nll: gelu: {base:.4f} nats; ")
    assert f". with the padding counted: gelu: {0.4 * base:.4f} nats; " in text
    assert text.count("% (n = 8)") == 6


def test_the_scripts_print_them(searched: Path, capsys: pytest.CaptureFixture):
    assert budget.main([str(searched)]) == 0
    out = capsys.readouterr().out
    assert "Importance of hyperparameters (PED-ANOVA)" in out
    assert "Loss against the searched alpha" in out
    assert improvement.main([str(searched)]) == 0
    out = capsys.readouterr().out
    assert "The learning-rate grid" in out
    assert "At equal learning rate (val_nll)" in out
