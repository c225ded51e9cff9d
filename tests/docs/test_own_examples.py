"""The examples of a user's own training: each runs, is short, and takes the time that the docs say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import examples
import pytest

from analysis.io.study import load as load_tables
from analysis.verdict.decide import decide
from tune.backend.inline import Inline
from tune.study.files import load
from tune.subject.own_worker import OwnTrial, function_of, returned
from tune.sweep import sweep

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "examples"
NEEDS = {"hf_trainer": "accelerate", "sklearn_models": "sklearn", "torch_optimizers": "torch"}
FUNCTIONS = sorted(NEEDS)
MINE = [*FUNCTIONS, "numpy_command"]  # tests/tune/subject/test_gpt2_function.py has the other one


def short_trial(name: str, arm: str, seed: int, folder: Path, budget: int = 2) -> tuple[list[dict], dict[str, float]]:
    """Train a short trial of an example's function in this process; return its reports and its result."""
    pytest.importorskip(NEEDS[name])
    study = load(FOLDER / f"{name}.yaml")
    told: list[dict] = []
    values = study.values(arm, {name: where.values[0] for name, where in study.nuisance.items()})
    order = {"arm": arm, "seed": seed, "budget": budget, "unit": study.unit, "test": True, "folder": str(folder)}
    order |= {"values": values, "metric": study.metric.name, "test_metric": study.metric.test}
    trial = OwnTrial(order, lambda **line: told.append(line), lambda: None)
    return told, returned(trial, function_of(str(FOLDER / f"{name}.py"), "train")(trial), study.metric.test)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_short_trial_follows_from_its_seed_and_its_arm(name, tmp_path):
    study = load(FOLDER / f"{name}.yaml")
    one, again, other = (short_trial(name, study.baseline, seed, tmp_path) for seed in (1, 1, 2))
    assert one == again
    assert [line["step"] for line in one[0]] == [2]
    assert one[1][study.metric.test] != other[1][study.metric.test]
    for arm, options in study.arms.items():
        if not options.baseline and not options.of:
            assert short_trial(name, arm, 1, tmp_path)[1] != one[1]


def test_the_command_prints_its_metrics():
    command = [sys.executable, "numpy_command.py", "--steps", "30", "--seed", "1", "--lr", "0.1"]
    said = [
        subprocess.run([*command, *more], cwd=FOLDER, capture_output=True, text=True, check=True).stdout
        for more in (["--test", "1"], ["--test", "0"], ["--test", "0", "--beta", "0.9"])
    ]
    assert re.findall(r"METRIC (\w+)=[\d.]+(?: step=(\d+))?\n", said[0]) == [
        ("val_r2", "20"),
        ("val_r2", "30"),
        ("test_r2", ""),
    ]
    assert said[0].startswith(said[1])
    assert "test" not in said[1]
    assert said[2] != said[1]


@pytest.mark.parametrize("name", MINE)
def test_a_study_adds_at_most_ten_lines_to_a_script(name):
    code = (FOLDER / f"{name}.py").read_text().split('"""', 2)[2]
    assert 1 <= sum("trial" in line or "METRIC" in line for line in code.splitlines()) <= 10


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_the_page_of_examples_names_each(name):
    assert f"[{name}.py]({name}.py)" in (FOLDER / "README.md").read_text()


def test_the_table_of_the_docs_is_of_these_files_and_no_example_takes_five_minutes():
    found = json.loads((ROOT / "docs" / "examples.json").read_text())
    assert sorted(found) == examples.NAMES
    assert examples.markdown(found) in (ROOT / "docs" / "own-training.md").read_text(encoding="utf-8")
    for name, row in found.items():
        assert row["files"] == examples.digest(name), f"python benchmarks/examples.py {name}"
        assert (row["seconds"] < 300, row["cores"]) == (True, 2)
        assert row["kinds"]["short"] == "worse"


@pytest.mark.slow
@pytest.mark.parametrize("name", MINE)
def test_an_example_ends_in_a_verdict(name, tmp_path, monkeypatch):
    """Run a whole example; each takes a few minutes."""
    pytest.importorskip(NEEDS.get(name, "numpy"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    run = sweep(load(FOLDER / f"{name}.yaml"), FOLDER, tmp_path, Inline())
    assert run.stages.finished
    result = decide(load_tables(run.folder))
    assert result.sensitivity.testable
    assert {row.arm: row.verdict for row in result.comparisons}["short"] == "worse"
