"""Check the cells that a study file asks for and its tables lack."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from analysis import growth, improvement, significance
from analysis.io.assemble import Study, assemble
from analysis.io.command import run
from analysis.io.study import load
from analysis.report import build
from analysis.verdict.checks import unfinished
from analysis.verdict.decide import decide
from tests.analysis.helpers import simulate

ARMS = {"gelu": {"baseline": True}, "a": {}}


def study(seeds: int, gap: float = 0.0, trials: int = 3, outcome: str = "completed", **settings: object) -> Study:
    """Make a study of two arms with `trials` search trials and `seeds` confirm seeds each; `a` is `gap` nats better."""
    draw = np.random.default_rng(5)
    rows = [
        {"stage": "search", "arm": arm, "seed": 1, "config_key": str(i), "outcome": outcome, "val_nll": 3.3}
        for arm in ARMS
        for i in range(trials)
    ]
    rows += [
        {"stage": "confirm", "arm": arm, "seed": seed, "config_key": "0", "outcome": "completed"}
        | {"val_nll": 3.3 - gap * (arm == "a") + 0.004 * draw.standard_normal()}
        for seed in range(101, 101 + seeds)
        for arm in ARMS
    ]
    said = {"arms": ARMS, "search": {"trials_per_arm": 3}, "confirm": {"seeds": 5}} | settings
    return assemble("x", "x", pd.DataFrame(rows), pd.DataFrame(), said)


@pytest.mark.parametrize("seeds", [5, 6])
def test_a_study_with_all_its_seeds_lacks_nothing(seeds):
    assert unfinished(study(seeds)) == ""


def test_missing_trials_are_counted():
    assert unfinished(study(4)) == "8 of 10 confirm trials"
    assert unfinished(study(0)) == "0 of 10 confirm trials"


def test_a_sequential_rule_may_stop_at_a_look_that_decides_and_at_its_cap():
    rule = {"rule": "obrien-fleming", "margin": 1e-5}  # looks at 3, 5, 8 and 10 seeds
    assert unfinished(study(5, gap=0.03, confirm=rule)) == ""
    assert unfinished(study(4, gap=0.03, confirm=rule)) == "8 of 10 confirm trials to the next look"
    assert unfinished(study(5, gap=0.0, confirm=rule)) == "10 of 16 confirm trials to the next look"
    assert unfinished(study(10, gap=0.0, confirm=rule)) == ""


def test_a_study_without_confirm_lacks_search_trials_only():
    assert unfinished(study(0, stages=["search"])) == ""
    assert unfinished(study(0, trials=2, stages=["search"])) == "4 of 6 search trials"


def test_a_search_without_a_trained_trial_is_no_finished_study():
    assert unfinished(study(0, outcome="infeasible")) == "no search trial could be trained"
    assert unfinished(study(0, trials=2, outcome="failed")) == "4 of 6 search trials"


def test_a_table_without_a_study_file_is_finished():
    rows = pd.DataFrame([("gelu", 1, 3.3), ("a", 1, 3.2)], columns=["arm", "seed", "val_nll"])
    assert unfinished(assemble("x", "x", rows, pd.DataFrame(), {}, baseline="gelu")) == ""


WORDS = ("better", "worse", "no difference", "undecided", "not testable", "cannot tell", "rises", "falls", "p_adjusted")


def test_an_unfinished_study_has_no_verdict_and_no_number_of_one(tmp_path: Path):
    folder = simulate(tmp_path / "demo")
    build.build(folder)
    assert (folder / "figures" / "differences.svg").exists()
    trials = pd.read_parquet(folder / "trials.parquet")
    cut = (trials["stage"] == "confirm") & ((trials["seed"] == 107) | (trials["arm"] == "paglu-per-layer"))
    trials[~cut].to_parquet(folder / "trials.parquet")
    result = decide(load(folder))
    assert result.unfinished == "21 of 32 confirm trials"
    assert result.summary == (
        "Unfinished: 21 of 32 confirm trials. No arm is compared before the last trial has ended."
    )
    for row in result.comparisons:
        assert (row.kind, row.verdict) == ("unfinished", "unfinished")
        assert row.p_t is row.p_adjusted is row.improvement_percent is row.improvement_low is row.d_z is None
    assert result.sensitivity.testable is result.sensitivity.gap_percent is None
    build.build(folder)
    page = (folder / "report.html").read_text()
    assert "<title>demo: unfinished</title>" in page
    told = page.split(">Methods</h2>")[0].split("</style>")[1]
    for text in (told, (folder / "verdict.md").read_text(), "\n".join(terminal_lines(result))):
        assert "Unfinished: 21 of 32 confirm trials" in text
        assert not [word for word in WORDS if word in text.lower()]
    for old in (
        "figures/differences.svg",
        "figures/over_training.pdf",
        "tables/verdict.csv",
        "tables/over_training.tex",
    ):
        assert not (folder / old).exists()  # nor those of the report before
    assert (folder / "figures" / "loss_curves.svg").exists()


def test_a_study_without_any_trial_is_unfinished_and_no_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = simulate(tmp_path / "demo")
    pd.read_parquet(folder / "trials.parquet").head(0).to_parquet(folder / "trials.parquet")
    for main in (significance.main, growth.main):
        with pytest.raises(SystemExit) as ended:
            run(lambda main=main: main([str(folder)]))
        assert ended.value.code == 1
        assert capsys.readouterr().err == f"unfinished: no trial of {folder} has ended yet\n"


def terminal_lines(result):
    """Return what the terminal shows of a verdict."""
    console = Console(width=200, file=io.StringIO())
    console.print(build.terminal_table(result))
    return console.file.getvalue().splitlines()


def test_commands_on_an_unfinished_study_say_so_and_exit_with_1(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = simulate(tmp_path / "demo")
    trials = pd.read_parquet(folder / "trials.parquet")
    trials[(trials["stage"] != "confirm") | (trials["seed"] < 102)].to_parquet(folder / "trials.parquet")
    fresh = subprocess.run([sys.executable, "-m", "analysis.significance", str(folder)], capture_output=True, text=True)
    assert (fresh.returncode, fresh.stderr) == (1, "unfinished: 8 of 32 confirm trials\n")
    assert "Unfinished: 8 of 32 confirm trials." in fresh.stdout
    for main in (significance.main, improvement.main, growth.main):
        assert main([str(folder)]) == 1
        said = capsys.readouterr()
        assert "unfinished: 8 of 32 confirm trials" in said.err
        assert not [word for word in WORDS if word in said.out.replace("P(better)", "").lower()]
