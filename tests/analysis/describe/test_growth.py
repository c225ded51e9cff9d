"""Slope of the difference over training: over all of it, which decides, and over the second half (exploratory)."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from analysis.describe import growth, improvement
from analysis.describe.curves import SCALES
from analysis.growth import main
from analysis.io.study import load
from analysis.published import claims_ours, page
from analysis.report import takeaways
from analysis.report.figures import drawn
from analysis.report.findings import Findings
from analysis.verdict import looks

TOKENS = np.arange(1, 11) * 60_000
RISE_THEN_FALL = np.array([0.0, 0.6, 1.2, 1.8, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5])  # in percent, falls after the middle
NOISE = {100: 0.02, 101: -0.03, 102: 0.05, 103: 0.01}  # slope of each seed, in percent per doubling


def write(folder: Path, percent: dict[str, np.ndarray], noise: dict[int, float] = NOISE) -> Path:
    """Write a study whose improvements over training are `percent` by arm, plus a slope of its own for each seed."""
    trials, curves = [], []
    for seed, own in noise.items():
        for arm in ("gelu", *percent):
            loss = 4.0 * (1 - (percent[arm] + own * np.log2(TOKENS)) / 100) if arm != "gelu" else np.full(10, 4.0)
            trials.append({"stage": "confirm", "arm": arm, "seed": seed, "val_nll": loss[-1]})
            curves += [
                {"stage": "confirm", "arm": arm, "seed": seed, "step": t // 1000, "tokens": t, "val_nll": x}
                for t, x in zip(TOKENS, loss, strict=True)
            ]
    pd.DataFrame(trials).to_parquet(folder / "trials.parquet")
    pd.DataFrame(curves).to_parquet(folder / "curves.parquet")
    arms = {"gelu": {"baseline": True}} | {arm: {"unit": arm} for arm in percent}
    (folder / "study.yaml").write_text(yaml.safe_dump({"name": "made-up", "arms": arms}, sort_keys=False))
    return folder


def of(rows: list[dict], arm: str) -> dict:
    return next(row for row in rows if row["arm"] == arm and row["scale"] == SCALES["log2"][1])


def test_the_report_and_the_growth_command_give_one_adjusted_answer(tmp_path: Path):
    noise = {100 + i: x for i, x in enumerate((0.02, 0.06, 0.09, 0.02, 0.11, 0.0))}
    arms = {name: np.zeros(10) for name in ("a", "b", "c")}
    folder = write(tmp_path, arms, noise)
    p = stats.ttest_1samp(list(noise.values()), 0.0).pvalue
    assert p < 0.05 < 3 * p  # each arm alone would rise
    found = Findings(load(folder))
    for row in found.slopes:
        assert row["p"] == pytest.approx(p)
        assert row["p_adjusted"] == pytest.approx(3 * p)
        assert (row["why"], row["trend"]) == ("undecided", "undecided")
        assert of(found.growth, row["arm"])["verdict"] == row["why"]
        assert of(found.growth, row["arm"])["p_adjusted"] == row["p_adjusted"]
    assert takeaways.over_training(found.slopes) == "Over training the improvement is undecided for a, b and c."
    shown = improvement.extend(load(folder), found.result)["slopes"]
    assert [row["p_adjusted"] for row in shown] == [row["p_adjusted"] for row in found.slopes]
    alone = Findings(load(write(tmp_path, {"a": np.zeros(10)}, noise)))
    assert [row["why"] for row in alone.slopes] == ["rises with tokens"]


def test_a_rise_that_ends_in_a_fall_is_seen_in_the_second_half(tmp_path: Path):
    rows = growth.table(load(write(tmp_path, {"bends": RISE_THEN_FALL, "rises": 0.5 * np.log2(TOKENS)})))
    bends, rises = of(rows, "bends"), of(rows, "rises")
    assert bends["verdict"] == rises["verdict"] == "rises with tokens"  # the test that was fixed in advance
    late = np.polyfit(np.log2(TOKENS[4:]), RISE_THEN_FALL[4:], 1)[0]  # from half of 600,000 tokens on
    per_seed = late + np.array(list(NOISE.values()))
    test = stats.ttest_1samp(per_seed, 0.0)
    assert bends["late"] == pytest.approx(per_seed.mean())
    assert bends["late"] < 0 < bends["slope"]
    assert (bends["late_low"], bends["late_high"]) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert bends["late_p"] == pytest.approx(test.pvalue)
    assert rises["late"] == pytest.approx(0.5 + np.mean(list(NOISE.values())))
    said = growth.turned(rows)
    assert said.startswith(f"In the second half of training the slope has the other sign: bends ({bends['late']:+.3f}")
    assert said.endswith("over all of training: rises with tokens).")
    assert "rises (" not in said


def test_a_second_half_that_may_be_flat_is_not_said_to_turn(tmp_path: Path):
    flat = np.minimum(RISE_THEN_FALL, 2.0)
    flat[4:] = 2.0
    rows = growth.table(load(write(tmp_path, {"flat": flat}, {100: 0.02, 101: -0.05, 102: 0.01, 103: -0.01})))
    row = of(rows, "flat")
    assert row["verdict"] == "rises with tokens"
    assert row["late_low"] < 0 < row["late_high"]
    assert growth.turned(rows) == ""


def test_one_seed_has_a_slope_in_each_part_and_no_test(tmp_path: Path):
    row = of(growth.table(load(write(tmp_path, {"bends": RISE_THEN_FALL}, {100: 0.0}))), "bends")
    assert (row["p"], row["late_p"], row["late_low"]) == (None, None, None)
    assert row["late"] == pytest.approx(np.polyfit(np.log2(TOKENS[4:]), RISE_THEN_FALL[4:], 1)[0])
    assert growth.turned([row]) == ""


def test_page_and_claims_name_the_second_half_exploratory(tmp_path: Path, capsys: pytest.CaptureFixture):
    study = load(write(tmp_path, {"bends": RISE_THEN_FALL}))
    rows = growth.table(study)
    row = of(rows, "bends")
    text = "\n".join(page.second_half(rows))
    assert text.startswith("Exploratory: ")
    assert "decides nothing" in text
    assert f"| bends | {row['late']:+.3f} | {row['late_low']:+.3f} | {row['late_high']:+.3f} |" in text
    claim = claims_ours.text(claims_ours.said(study)["growth"])
    assert f"second half, exploratory: bends: {row['late']:+.3f}% per doubling" in claim
    assert main(["--study", str(tmp_path), "--format", "csv"]) == 0
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split(",")[-4:] == ["late", "late_low", "late_high", "late_p"]
    assert float(first.split(",")[-4]) == pytest.approx(row["late"])
    assert main(["--study", str(tmp_path)]) == 0
    assert "In the second half of training the slope has the other sign" in " ".join(capsys.readouterr().out.split())


def test_a_slope_of_a_study_with_looks_says_that_its_test_ignores_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = write(tmp_path, {"a": RISE_THEN_FALL, "b": np.zeros(10)}, {100 + i: 0.01 * i for i in range(8)})
    said = "The test of a slope ignores the looks, so it may err more often than its level says."
    settings = yaml.safe_load((folder / "study.yaml").read_text())
    main([str(folder)])
    assert "looks" not in capsys.readouterr().out
    assert takeaways.over_training(Findings(load(folder)).slopes, looks.not_of_slopes(load(folder))).endswith(
        "rises for a and b."
    )
    table = pd.read_parquet(folder / "trials.parquet")
    table.assign(look=np.where(table["seed"] < 106, 6, 8)).to_parquet(folder / "trials.parquet")
    (folder / "study.yaml").write_text(yaml.safe_dump(settings | {"contrasts": [["a", "b"]], "confirm": {"seeds": 8}}))
    main([str(folder)])
    out = " ".join(capsys.readouterr().out.split())
    assert said in out
    assert "The level of 5% no longer holds: seeds were added after a verdict, without a reserve." in out
    assert "Contrasts are left out here" in out
    improvement.main([str(folder), "--format", "csv"])
    assert said in capsys.readouterr().err
    assert said in drawn(Findings(load(folder)))["over_training"].takeaway
