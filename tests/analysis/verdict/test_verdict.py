"""Check the decision on tables of every edge case that the protocol names."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from analysis import improvement, significance
from analysis.io import command, formats
from analysis.io.files import TableError
from analysis.io.study import load
from analysis.stats.power import power
from analysis.verdict.decide import verdict

FIRST_KEYS = [
    "arm", "baseline", "n", "improvement_percent", "improvement_low", "improvement_high", "mean_difference", "t", "df",
    "p_t", "p_sign_flip", "p_adjusted", "d_z", "mde_percent", "probability_of_improvement", "verdict", "why",
]  # fmt: skip
CASES = {
    case["id"]: case for case in json.loads((Path(__file__).parents[2] / "known_answers.json").read_text())["cases"]
}


def write(path: Path, arms: dict, seeds: dict | None = None) -> Path:
    """Write a CSV of arm, seed and val_nll; losses are a list (seeds 1, 2, ...) or a mapping of seed to loss."""
    rows = []
    for arm, losses in arms.items():
        pairs = losses.items() if isinstance(losses, dict) else enumerate(losses, 1)
        rows += [(arm, int(seed), loss) for seed, loss in pairs]
    pd.DataFrame(rows, columns=["arm", "seed", "val_nll"]).to_csv(path, index=False)
    return path


def decide(path: Path, arms: dict, **options: object) -> dict:
    return verdict(load(write(path, arms), baseline="gelu", **options))


def of_case(path: Path, name: str) -> dict:
    inputs = CASES[name]["inputs"]
    return decide(path, {"gelu": inputs["baseline"], "arm": inputs["treatment"]})["comparisons"][0]


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    return tmp_path / "runs.csv"


def test_one_comparison_has_the_named_keys_first_and_the_known_values(csv: Path):
    row = of_case(csv, "paired_t_n5")
    expected = CASES["paired_t_n5"]["expected"]
    assert list(row)[: len(FIRST_KEYS)] == FIRST_KEYS
    assert row["t"] == pytest.approx(expected["t"], abs=1e-9)
    assert row["p_t"] == row["p_adjusted"] == pytest.approx(expected["p_two_sided"], abs=1e-9)
    assert row["mean_difference"] == pytest.approx(expected["mean_diff"], abs=1e-9)
    assert row["sd_difference"] == pytest.approx(expected["sd_diff"], abs=1e-9)
    assert row["d_z"] == pytest.approx(expected["d_z"], abs=1e-9)
    assert row["p_sign_flip"] == 0.0625
    # MDE: the known d_z at n = 5 in percent of the baseline's mean
    assert row["mde_percent"] == pytest.approx(100 * 1.682 * expected["sd_diff"] / 3.305, abs=1e-4)
    assert row["verdict"] == "better"
    assert "fewer than 8 seeds are no claim" in row["why"]


def test_one_seed_is_not_testable_and_never_significant(csv: Path):
    row = of_case(csv, "edge_n1")
    assert row["improvement_percent"] == pytest.approx(3.0303030303030165, abs=1e-9)
    assert row["verdict"] == "not testable (n=1)"
    assert row["p_t"] is row["p_sign_flip"] is row["p_adjusted"] is row["improvement_low"] is None
    assert "significant" not in json.dumps(row)


def test_constant_differences_are_zero_variance(csv: Path):
    row = of_case(csv, "edge_constant_difference")
    assert row["verdict"] == "not testable (zero variance: check seeds were really different)"
    assert row["p_t"] is row["p_sign_flip"] is row["p_adjusted"] is None


def test_identical_arms(csv: Path):
    row = of_case(csv, "edge_identical_arms")
    assert row["verdict"] == "identical"
    assert row["improvement_percent"] == 0.0
    assert row["p_sign_flip"] == 1.0
    json.dumps(row, allow_nan=False)


def test_a_diverged_run_is_kept_as_the_worst_rank(csv: Path):
    expected = CASES["edge_diverged_worst_rank"]["expected"]
    d = [float(x) for x in CASES["edge_diverged_worst_rank"]["inputs"]["diff"]]
    arm = [3.3 - x if math.isfinite(x) else math.inf for x in d]
    row = decide(csv, {"gelu": [3.3] * 8, "arm": arm})["comparisons"][0]
    assert row["n"] == 8
    assert row["complete_pairs"] == expected["complete_pairs_n"]
    assert row["p_adjusted"] == row["p_worst_rank"] == pytest.approx(expected["wilcoxon_worst_rank_p"])
    assert row["p_sign_test"] == pytest.approx(expected["sign_test_p"])
    assert row["p_t"] == pytest.approx(expected["complete_pairs_t_p"], rel=1e-6)
    assert row["verdict"].startswith("undecided (needs about ")
    assert "arm diverged on seed 3" in row["why"]
    assert "intention to treat decides" in row["why"]
    assert "7 complete pairs only" in row["why"]
    json.dumps(row, allow_nan=False)


def test_an_arm_that_always_diverges_is_worse(csv: Path):
    row = decide(csv, {"gelu": list(np.linspace(3.2, 3.3, 8)), "arm": [math.inf] * 8})["comparisons"][0]
    assert row["verdict"] == "worse"
    assert row["p_adjusted"] == pytest.approx(2 / 2**8)
    assert row["improvement_percent"] is None
    assert row["probability_of_improvement"] == 0.0


def test_unequal_seeds_pair_on_the_intersection(csv: Path):
    row, expected = of_case(csv, "edge_unequal_seeds"), CASES["edge_unequal_seeds"]["expected"]
    assert row["seeds"] == expected["common"]
    assert (row["n"], row["t"], row["p_t"]) == pytest.approx((3, expected["t"], expected["p"]), abs=1e-9)
    assert row["improvement_percent"] == pytest.approx(expected["pct_on_common"], abs=1e-9)
    assert row["dropped_seeds_baseline"] == expected["dropped_baseline"]
    assert row["dropped_seeds_arm"] == expected["dropped_treatment"]
    assert "seeds 1, 5 of gelu" in row["why"]
    assert "seeds 6 of arm" in row["why"]


def test_checkpoints_of_one_run_are_one_sample(csv: Path):
    inputs = CASES["pseudo_replication_20_checkpoints"]["inputs"]
    rows = [
        (arm, 1, step, loss)
        for arm, key in (("gelu", "baseline_checkpoints"), ("arm", "treatment_checkpoints"))
        for step, loss in enumerate(inputs[key])
    ]
    pd.DataFrame(rows, columns=["arm", "seed", "step", "val_nll"]).to_csv(csv, index=False)
    row = verdict(load(csv, baseline="gelu"))["comparisons"][0]
    assert (row["n"], row["verdict"], row["p_t"]) == (1, "not testable (n=1)", None)
    assert row["improvement_percent"] == pytest.approx(100 * (1 - 1.9983 / 2.0339))
    pd.DataFrame(rows, columns=["arm", "seed", "step", "val_nll"]).drop(columns="step").to_csv(csv, index=False)
    with pytest.raises(TableError, match=r"duplicated confirm rows .*checkpoints of one run need a step column"):
        load(csv, baseline="gelu")


def test_a_run_that_ends_before_the_others_is_refused(csv: Path):
    rows = [(a, s, t, 3.0) for a in ("gelu", "arm") for s in (1, 2) for t in (0, 100)][:-1]
    pd.DataFrame(rows, columns=["arm", "seed", "step", "val_nll"]).to_csv(csv, index=False)
    with pytest.raises(TableError, match="'arm' seed 2 ends at step 0, others at 100"):
        load(csv, baseline="gelu")


def test_holm_counts_every_arm_the_floor_included(csv: Path):
    rng = np.random.default_rng(3)
    base = 3.3 + rng.normal(0, 0.01, 10)
    arms = {"gelu": base} | {f"a{i}": base - 0.004 * i + rng.normal(0, 0.004, 10) for i in range(3)}
    result = decide(csv, {k: list(v) for k, v in arms.items()} | {"broken": [3.3]}, floor=None)
    p = [r["p_t"] for r in result["comparisons"]]
    order = sorted(p[:3])
    running, want = 0.0, {}
    for rank, x in enumerate(order):  # Holm by hand over a family of four: the arm without a test counts with p = 1
        running = max(running, min(1.0, (4 - rank) * x))
        want[x] = running
    for row in result["comparisons"][:3]:
        assert row["p_adjusted"] == pytest.approx(want[row["p_t"]], rel=1e-12)
    assert result["comparisons"][3]["p_adjusted"] is None


def test_no_difference_larger_than_the_margin(csv: Path):
    rng = np.random.default_rng(0)
    base = 3.3 + rng.normal(0, 0.01, 12)
    arm = base + np.resize([0.001, -0.001, 0.0015, -0.0013], 12)
    row = decide(csv, {"gelu": list(base), "arm": list(arm)}, margin="0.5%")["comparisons"][0]
    assert row["verdict"] == "no difference larger than 0.5%"
    assert row["margin"] == pytest.approx(0.005 * base.mean())
    row = decide(csv, {"gelu": list(base), "arm": list(arm)}, margin=0.01)["comparisons"][0]
    assert row["verdict"] == "no difference larger than 0.01 nats"


def test_undecided_says_how_many_more_seeds(csv: Path):
    d = np.array([0.02, -0.01, 0.03, 0.01, -0.005, 0.015, 0.02, -0.02])
    base = np.linspace(3.28, 3.32, 8)
    row = decide(csv, {"gelu": list(base), "arm": list(base - d)}, margin=0.001)["comparisons"][0]
    more = int(row["verdict"].removeprefix("undecided (needs about ").split()[0])
    assert power(row["d_z"], 8 + more) >= 0.8 > power(row["d_z"], 8 + more - 1)


def test_a_floor_that_does_not_lose_makes_everything_untestable(csv: Path):
    base = np.linspace(3.2, 3.3, 8)
    noise = np.resize([0.01, -0.012, 0.004], 8)
    arms = {"gelu": base, "lin": base + noise, "arm": base - 0.1 + 0.1 * noise}
    result = decide(csv, {k: list(v) for k, v in arms.items()}, floor="lin")
    words = {r["arm"]: r["verdict"] for r in result["comparisons"]}
    assert words["arm"] == "not testable: the floor does not lose to gelu"
    assert result["sensitivity"]["testable"] is False
    assert [(r["arm"], r["kind"]) for r in result["comparisons"]][1:] == [("arm", "not_testable")]
    # the gap is the floor's improvement with the opposite sign
    floor = result["comparisons"][0]
    assert result["sensitivity"]["gap_percent"] == -floor["improvement_percent"]
    assert result["sensitivity"]["gap_low"] == -floor["improvement_high"] < 0


def test_a_floor_that_loses_by_three_percent_is_strong(csv: Path):
    base = np.linspace(3.2, 3.3, 8)
    noise = np.resize([0.01, -0.012, 0.004], 8)
    for gap, strong in ((0.05, False), (0.12, True)):
        arms = {"gelu": list(base), "lin": list(base + gap + noise), "arm": list(base - 0.1 + noise)}
        result = decide(csv, arms, floor="lin")
        assert (result["sensitivity"]["testable"], result["sensitivity"]["strong"]) == (True, strong)
        assert result["comparisons"][1]["verdict"] == "better"


def run(main, *args: object, capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    """Run a script; return its exit code, stdout and stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        command.run(lambda: main([str(a) for a in args]))
    captured = capsys.readouterr()
    return done.value.code, captured.out, captured.err


def test_only_a_baseline_has_nothing_to_show_and_says_so(csv: Path, capsys: pytest.CaptureFixture):
    write(csv, {"gelu": [3.3, 3.31, 3.29]})
    for script in (significance.main, improvement.main):
        code, _, err = run(script, csv, "--baseline", "gelu", capsys=capsys)
        assert code == 0
        assert "no treatment runs" in err


def test_bad_input_exits_2_with_one_line(csv: Path, capsys: pytest.CaptureFixture):
    write(csv, {"gelu": [3.3, 3.31], "arm": [3.2, 3.25]})
    for args in ((csv,), (csv, "--baseline", "glu"), (csv, "--format", "xml"), ("no-such-folder",)):
        code, out, err = run(significance.main, *args, capsys=capsys)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
    _, _, err = run(significance.main, csv, "--baseline", "glu", capsys=capsys)
    assert "allowed: gelu, arm" in err


def test_the_script_prints_the_verdict_as_strict_json(csv: Path):
    write(csv, {"gelu": [3.3], "arm": [3.2]})
    significance = [sys.executable, "-m", "analysis.significance", str(csv), "--baseline=gelu", "--format=json"]
    done = subprocess.run(significance, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    result = json.loads(done.stdout, parse_constant=lambda x: pytest.fail(f"{x} in JSON"))
    assert list(result)[:8] == [
        "schema", "study", "question", "metric", "level", "correction", "comparisons", "sensitivity",
    ]  # fmt: skip
    assert result["comparisons"][0]["verdict"] == "not testable (n=1)"


def test_improvement_in_nats_percent_and_perplexity(csv: Path, capsys: pytest.CaptureFixture):
    write(csv, {"gelu": [2.0247], "arm": [1.9865]})
    code, out, _ = run(improvement.main, csv, "--baseline", "gelu", "--format", "json", capsys=capsys)
    row = json.loads(out)["comparisons"][0]
    assert code == 0
    assert row["improvement_percent"] == pytest.approx(1.886699264088507, abs=1e-9)
    assert row["perplexity_reduction_percent"] == pytest.approx(3.7479582444003623, abs=1e-9)
    assert row["mean_difference"] == pytest.approx(0.0382, abs=1e-12)
    code, out, _ = run(improvement.main, csv, "--baseline", "gelu", "--format", "latex", capsys=capsys)
    assert r"\toprule" in out
    assert "+1.887" in out


def test_names_are_text_in_every_format(csv: Path, capsys: pytest.CaptureFixture):
    name = "[red]<b>50%_$x$|&\\"
    write(csv, {"gelu": [3.3, 3.31, 3.32], name: [3.29, 3.3, 3.33]})
    outputs = {}
    for kind in formats.FORMATS:
        code, outputs[kind], _ = run(significance.main, csv, "--baseline", "gelu", "--format", kind, capsys=capsys)
        assert code == 0
    assert name in outputs["terminal"]
    assert json.loads(outputs["json"])["comparisons"][0]["arm"] == name
    assert r"[red]<b>50\%\_\$x\$|\&\textbackslash{}" in outputs["latex"]
    assert r"[red]&lt;b\>50%\_$x$\|&amp;\\ |" in outputs["markdown"]


def test_the_table_of_a_narrow_terminal_breaks_lines_between_words():
    words = {
        "arm": "paglu-expanded against relu2",
        "n": 11,
        "p_adjusted": 0.0365,
        "verdict": "undecided (the cap is reached)",
    }
    numbers = {"n": 11, "p_adjusted": 0.0365, "improvement_percent": -3.08}
    numbers |= {"improvement_low": -5.85, "improvement_high": -0.18}
    out = io.StringIO()
    Console(file=out, width=80).print(formats.verdict_table([words | numbers], "", 80))
    shown = {word for line in out.getvalue().splitlines() for word in line.strip("│ ").replace("│", " ").split()}
    assert {"paglu-expanded", "relu2", "undecided", "reached)", "-3.08", "[-5.85,"} <= shown
