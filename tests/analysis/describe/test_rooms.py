"""Claims, alphas, budget, curves over training and the ledger, on simulated studies with known truth."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.describe import alphas, budget, calibration, fairness, improvement
from analysis.describe.curves import SCALES, over_training, slopes
from analysis.io import command
from analysis.io.assemble import assemble
from analysis.io.study import load
from analysis.published import claims
from analysis.report import build
from analysis.report.methods import methods
from analysis.verdict import checks
from analysis.verdict.decide import decide


def test_claims_reproduce_what_the_published_numbers_give():
    known = json.loads((Path(__file__).parents[2] / "known_answers.json").read_text())["cases"][0]["expected"]
    rows = {row["id"]: row for row in claims.table()}
    got = [c["improvement_percent"] for c in rows["improvement"]["comparisons"]]
    assert got[0] == pytest.approx(known["eval a0_lr5e-4 -> a0.5_lr5e-4 (same lr)"], abs=1e-9)
    assert got[1] == pytest.approx(known["eval a0_lr1e-4 -> a0.5_lr5e-4 (best baseline)"], abs=1e-9)
    assert got[2] == pytest.approx(-4.38, abs=0.005)
    assert got[3] == pytest.approx(known["eval a0_lr5e-4 -> a0_lr1e-4 (lr alone)"], abs=1e-9)
    assert rows["significance"]["verdict"] == rows["growth"]["verdict"] == "not testable (n=1)"
    assert claims.extra_parameters(12, 3072) + 124_439_808 == 351_005_952
    assert "351,005,952" in rows["parameters"]["own_numbers"]


def test_every_published_number_and_claim_names_its_page(capsys: pytest.CaptureFixture):
    data = claims.published()
    pages = [entry["page"] for entry in [*data["cells"].values(), *data["claims"]]]
    assert all(re.fullmatch(r"[\w/]+\.(md|py)#L\d+(-L\d+)?", page) for page in pages)
    assert re.fullmatch(r"[0-9a-f]{40}", data["source"]["commit"])
    assert claims.main([]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"pages are of {data['source']['repository']} at commit {data['source']['commit'][:7]}" in out
    assert "RESEARCH_SUMMARY.md#L12" in out


def test_the_published_growth_is_not_monotone_in_its_own_numbers():
    rows = {row["id"]: row for row in claims.table()}
    got = [c["improvement_percent"] for c in rows["growth"]["comparisons"]]
    losses = [(2.382, 2.363), (2.295, 2.278), (2.253, 2.237), (2.219, 2.194), (2.0247, 1.9865)]
    assert got == pytest.approx([100 * (b - a) / b for b, a in losses])
    assert got[0] > got[1] > got[2]
    best = rows["best"]["comparisons"]
    assert best[1]["improvement_percent"] == pytest.approx(100 * (1.8519 - 1.8683) / 1.8519)


def test_claims_with_a_study_compare_with_the_floor_too(demo: Path, capsys: pytest.CaptureFixture):
    rows = {row["id"]: row["study demo"] for row in claims.table(load(demo))}
    assert "over linear-floor, the published baseline: paglu-searched: +5" in rows["improvement"]
    assert "against gelu: linear-floor: -4" in rows["identical"]
    assert "rises with tokens" in rows["growth"]
    with pytest.raises(SystemExit) as done:
        command.run(lambda: claims.main(["--study", str(demo), "--format", "csv"]))
    assert done.value.code == 0
    assert "what" not in capsys.readouterr().out.splitlines()[0]  # keys, not headings


def test_alphas_by_layer(demo: Path):
    rows = alphas.summarise(load(demo))
    assert [(r["arm"], r["layer"]) for r in rows] == [("paglu-per-layer", i) for i in range(4)]
    trials = pd.read_parquet(demo / "trials.parquet").query("stage == 'confirm' and arm == 'paglu-per-layer'")
    for row in rows:
        values = trials[f"alpha_layer_{row['layer']}"]
        assert (row["n"], row["mean"], row["sd"]) == pytest.approx((8, values.mean(), values.std(ddof=1)))
        assert row["low"] < 0.3 + 0.3 * row["layer"] < row["high"] or row["layer"] == 3
        assert (row["up"], row["down"]) == ((values > 0.5).sum(), (values < 0.5).sum())  # their initial value


def test_a_table_without_rows_exits_0_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "x.csv"
    file.write_text("arm,seed,loss\na,1,3.0\nb,1,3.1\n")
    for main, why in ((alphas.main, "no confirm run of this study learned alpha"), (budget.main, "no search trials")):
        assert main([str(file), "--baseline", "a"]) == 0
        assert capsys.readouterr().err.startswith(f"nothing to show: {why}")


def test_budget_curves_end_at_the_best_trial(demo: Path):
    study = load(demo)
    rows = pd.DataFrame(budget.curves(study))
    search = study.trials.query("stage == 'search'")
    for arm, of_arm in rows.groupby("arm"):
        mine = search[(search["arm"] == arm) & (search["outcome"] != "infeasible")]["val_nll"]
        assert of_arm["without_replacement"].iloc[-1] == pytest.approx(mine.min())
        assert (of_arm["without_replacement"].dropna().diff().dropna() <= 1e-12).all()
    assert (rows["infeasible"] != "0 of 6").any()


def test_improvement_over_training_and_its_slope(demo: Path):
    study = load(demo)
    training = over_training(study)
    assert set(training) == {"linear-floor", "paglu-searched", "paglu-per-layer"}
    table = training["linear-floor"]
    curves = study.curves.query("stage == 'confirm'")
    last = curves[curves["step"] == 200].pivot(index="seed", columns="arm", values="val_nll").mean()
    want = 100 * (1 - last["linear-floor"] / last["gelu"])
    assert table["improvement_percent"].iloc[-1] == pytest.approx(want)
    assert (table["low"] < table["improvement_percent"]).all()
    rows = {r["arm"]: r for r in slopes(study)}
    assert rows["paglu-searched"]["why"] == "rises with tokens"
    assert rows["linear-floor"]["slope_percent_per_doubling"] < 0
    assert rows["paglu-searched"]["n"] == 8


def test_slope_of_exact_curves(demo: Path):
    # baseline 2, arm 2 (1 - (k + noise_seed) log2(tokens) / 100): the slope is k + noise_seed
    rows = [
        ("confirm", arm, seed, "k", t, 2.0 if arm == "gelu" else 2 * (1 - (1.0 + noise) * np.log2(t) / 100), t)
        for seed, noise in ((100, 0.1), (101, -0.1), (102, 0.3))
        for t in (64, 128, 256, 512)
        for arm in ("gelu", "paglu-searched")
    ]
    names = ["stage", "arm", "seed", "config_key", "step", "val_nll", "tokens"]
    pd.DataFrame(rows, columns=names).to_parquet(demo / "curves.parquet")
    trials = pd.read_parquet(demo / "trials.parquet").assign(config_key="k")
    trials.to_parquet(demo / "trials.parquet")
    (row,) = slopes(load(demo))
    assert row["slope_percent_per_doubling"] == pytest.approx(1.1)
    assert row["n"] == 3


def test_no_line_is_drawn_through_one_number_of_tokens(demo: Path):
    curves = pd.read_parquet(demo / "curves.parquet").assign(tokens=64)
    curves.to_parquet(demo / "curves.parquet")
    for scale in SCALES:
        for row in slopes(load(demo), scale=scale):
            assert row["why"].startswith("fewer than 2 evaluations")
            assert row["values"] == {}


def test_at_grid_is_the_ratio_of_means_on_the_selection_seeds(demo: Path):
    study = load(demo)
    rows = calibration.at_grid(study)
    assert len(rows) == 9
    grid = study.trials.query("stage == 'calibrate' and lr == 0.002").groupby("arm")["val_nll"].mean()
    row = next(r for r in rows if r["lr"] == 0.002 and r["arm"] == "linear-floor")
    want = 100 * (1 - grid["linear-floor"] / grid["gelu"])
    assert (row["improvement_percent"], row["n"]) == pytest.approx((want, 2))


def test_ledger_adds_up(demo: Path):
    study = load(demo)
    rows = fairness.ledger(study)
    assert [(r["search"], r["calibrate"], r["confirm"]) for r in rows] == [(6, 6, 8)] * 4
    assert rows[0]["tokens"] == 20 * 400_000
    assert rows[0]["flops"] == pytest.approx(20 * 400_000 * 6_600_000)
    assert fairness.unfair(rows) == []
    assert checks.edge_hits(study) == []
    study.trials.loc[study.trials["stage"] == "confirm", "lr"] = 4e-3
    assert checks.edge_hits(study) == study.arms


def test_the_ledger_says_rate_path_and_what_a_gpu_did(demo: Path):
    trials = pd.read_parquet(demo / "trials.parquet")
    plain = build.build(demo).read_text(encoding="utf-8")
    assert "tokens/s" in plain
    assert "FLOPs utilisation" not in plain  # an older table, without these columns, can still be read
    assert "share compiled" not in plain
    done = trials["outcome"] == "completed"
    for arm, rate, share in (("gelu", 30_000.0, 0.4), ("linear-floor", 50_000.0, 0.2)):
        own = done & (trials["arm"] == arm)
        trials.loc[own, "tokens_per_second"] = rate
        trials.loc[own, "flops_utilisation"] = share
        trials.loc[own, "peak_gpu_mb"] = np.arange(own.sum(), dtype=float)
        trials.loc[own, "compiled"] = np.where(trials.loc[own, "stage"] == "confirm", 1.0, 0.0)
    trials.loc[~done, "tokens_per_second"] = 1.0  # a trial that was stopped early is not a measurement
    trials.to_parquet(demo / "trials.parquet")
    rows = {row["arm"]: row for row in fairness.ledger(load(demo))}
    n = int((done & (trials["arm"] == "gelu")).sum())
    assert (rows["gelu"]["tokens_per_second"], rows["gelu"]["flops_utilisation"]) == (30_000.0, 0.4)
    assert (rows["gelu"]["peak_gpu_mb"], rows["gelu"]["compiled"]) == (n - 1, 8 / n)
    assert rows["linear-floor"]["flops_utilisation"] == 0.2
    assert rows["paglu-searched"]["flops_utilisation"] is None
    assert rows["paglu-searched"]["compiled"] is None
    shown = build.build(demo).read_text(encoding="utf-8")
    assert "FLOPs utilisation" in shown
    assert "0.400" in shown


def test_improvement_json_holds_what_stands_beside(demo: Path):
    study = load(demo)
    result = improvement.extend(study, decide(study))
    row = result["comparisons"][1]
    trials = study.trials.query("stage == 'confirm'").pivot(index="seed", columns="arm", values="val_bpb")
    want = (trials["gelu"] - trials["paglu-searched"]).mean()
    assert row["bits_per_byte"] == pytest.approx(want)
    assert len(result["over_training"]["paglu-searched"]) == 10
    json.dumps(result, allow_nan=False)


def test_methods_name_roles_and_never_give_the_stock_model_a_base():
    arms = {
        "gelu": {"baseline": True, "floor": False, "base": "identity"},
        "flat": {"baseline": False, "floor": True, "gate": "sigmoid", "base": "identity", "alpha": 0.0},
    }
    rows = [{"arm": arm, "seed": seed, "val_nll": 3.0 + seed} for arm in arms for seed in (1, 2)]
    study = assemble("x", "x", pd.DataFrame(rows), pd.DataFrame(), {"arms": arms})
    said = next(line for line in methods(study) if line.startswith("Arms"))
    assert said == "Arms: gelu (baseline, stock activation); flat (floor, gate sigmoid, base identity, alpha 0)."


def test_an_arm_that_trains_slower_than_the_baseline_is_named(demo: Path):
    trials = pd.read_parquet(demo / "trials.parquet")
    confirm = trials["stage"] == "confirm"
    # pairs by seed: the machine was half as fast for the odd seeds, in all arms
    trials.loc[confirm, "tokens_per_second"] = np.where(trials.loc[confirm, "seed"] % 2, 10_000.0, 20_000.0)
    trials.loc[confirm & (trials["arm"] == "paglu-searched"), "tokens_per_second"] *= 0.9
    trials.loc[confirm & (trials["arm"] == "linear-floor"), "tokens_per_second"] *= 0.99
    trials.to_parquet(demo / "trials.parquet")
    rows = fairness.ledger(load(demo))
    speeds = {row["arm"]: row["speed"] for row in rows}
    assert speeds == pytest.approx({"gelu": 1, "linear-floor": 0.99, "paglu-searched": 0.9, "paglu-per-layer": 1})
    assert fairness.slower(rows) == "Slower than the baseline, at equal tokens: paglu-searched (0.90) of its speed."
    assert fairness.slower([row | {"speed": None} for row in rows]) == ""
    fast = [row | {"tokens_per_second": row["tokens_per_second"] * (2 - row["speed"])} for row in rows]
    assert fairness.slower([{**row, "tokens_per_second": 1e6} if row["speed"] < 1 else row for row in fast]) == ""
    assert "paglu-searched (0.90) of its speed" in build.build(demo).read_text(encoding="utf-8")
