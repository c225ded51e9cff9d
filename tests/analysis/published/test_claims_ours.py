"""Check what a study says of each published claim, and the sentences on all studies together."""

import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

from analysis.io.assemble import Study
from analysis.io.study import load
from analysis.published import claims, claims_ours, index
from analysis.verdict.decide import verdict


def with_arms(folder: Path, **options: dict) -> Study:
    """Load the study of a folder with other settings of some arms."""
    settings = yaml.safe_load((folder / "study.yaml").read_text())
    settings["arms"] |= {name.replace("_", "-"): arm for name, arm in options.items()}
    (folder / "study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return load(folder)


def test_alpha_is_printed_for_arms_with_a_gate_alone(demo: Path):
    trials = pd.read_parquet(demo / "trials.parquet")
    trials["alpha"] = trials["arm"].map({"gelu": 0.0, "linear-floor": 0.0, "paglu-searched": 1.25})
    trials.to_parquet(demo / "trials.parquet")
    study = with_arms(demo, paglu_per_layer={"unit": "silu"})
    chosen = {row["arm"]: row["chosen by search and calibration"] for row in claims_ours.said(study)["best"]}
    assert chosen == {
        "gelu": "lr 0.002",  # the table has alpha 0 for it
        "linear-floor": "lr 0.002, alpha 0",
        "paglu-searched": "lr 0.002, alpha 1.25",
        "paglu-per-layer": "lr 0.002",
    }


@pytest.mark.parametrize(
    ("alpha", "has"), [(0.5, True), ([0.5, 0.5, 0.5, 0.5], True), ([0.5, 0.4, 0.5, 0.5], False), (0.4, False)]
)
def test_what_the_claim_is_about_is_said_to_be_missing_where_it_is(demo: Path, alpha: object, has: bool):
    study = with_arms(demo, paglu_searched={"gate": "sigmoid", "alpha": alpha})
    assert claims_ours.has_claimed_arm(study) is has
    notes = claims_ours.notes(124_439_808, study)
    assert ("improvement" not in notes) is ("best" not in notes) is has
    sentence = "None of these studies has an arm of fixed alpha 0.5, which the claim is about"
    assert (sentence in index.claims_page([study])) is not has


def test_a_learned_alpha_that_starts_at_the_claimed_one_is_not_fixed_there(demo: Path):
    assert not claims_ours.has_claimed_arm(load(demo))
    assert "improvement" not in claims_ours.notes(1)  # without a study there is no note


def test_the_memory_of_a_process_is_said_to_be_the_libraries(demo: Path):
    note = claims_ours.notes(124_439_808, load(demo))["memory"]
    # 16 bytes per parameter, 1,100,000 parameters
    assert "mostly the libraries: weights, gradients and AdamW's moments are 17.6 MB in demo" in note
    assert "124,439,808 parameters" in note
    rows = {row["id"]: row for row in claims.table(load(demo))}
    assert rows["memory"]["note"] == note
    assert rows["growth"]["note"] is None


def test_a_claim_has_a_row_an_arm(demo: Path):
    study = load(demo)
    page = index.claims_page([study])
    part = page.split("## improvement")[1].split("\n## ")[0]
    head, _, *rows = [line.strip("| ") for line in part.splitlines() if line.startswith("|")]
    assert head.split(" | ") == ["study", "arm", "over gelu", "over linear-floor, the published baseline"]
    assert [row.split(" | ")[1] for row in rows] == ["paglu-searched", "paglu-per-layer"]
    of = {row["arm"]: row for row in verdict(study)["comparisons"]}
    for row in rows:
        arm, over = row.split(" | ")[1:3]
        assert over.startswith(f"{of[arm]['improvement_percent']:+.2f}% [{of[arm]['improvement_low']:+.2f}, ")
    assert not re.search(r"\(n = \d+\).*\(n = \d+\).*\(n = \d+\)", part)  # no cell has many results
    said = claims_ours.text(claims_ours.said(study)["significance"])
    assert said.startswith("over gelu: paglu-searched: ")
    assert said.count("p = ") == 2


def test_padding_is_a_row_an_arm_with_both_losses(demo: Path):
    trials = pd.read_parquet(demo / "trials.parquet")
    trials["padded_nll"] = 2 * trials["val_nll"] + (trials["arm"] == "linear-floor")
    trials.to_parquet(demo / "trials.parquet")
    base = trials.query("stage == 'confirm' and arm == 'gelu'")
    floor = trials.query("stage == 'confirm' and arm == 'linear-floor'")
    rows = {row["arm"]: row for row in claims_ours.said(load(demo))["padding"]}
    assert rows["gelu"]["with the padding counted"] == f"{base['padded_nll'].mean():.4f} nats"
    percent = 100 * (1 - floor["padded_nll"].mean() / base["padded_nll"].mean())
    assert rows["linear-floor"]["with the padding counted"] == f"{percent:+.2f}% (n = 8)"
    assert list(rows) == list(load(demo).arms)


def test_a_table_from_elsewhere_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture, demo: Path):
    rows = [(arm, seed, 3 + 0.1 * (arm == "base") + seed / 100) for arm in ("base", "mine") for seed in range(4)]
    rows[0] = ("base", 0, 3.2)
    pd.DataFrame(rows, columns=["arm", "seed", "loss"]).to_csv(tmp_path / "runs.csv", index=False)
    assert claims.main([str(tmp_path / "runs.csv"), "--baseline", "base", "--format", "csv"]) == 0
    said = "is a table from elsewhere: it says something of a claim only if its arms and its model are those of the"
    assert said in capsys.readouterr().err
    assert claims.main([str(demo), "--format", "csv"]) == 0
    assert "elsewhere" not in capsys.readouterr().err
