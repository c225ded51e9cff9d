"""Test cells, plan and report of studies without all stages and of a grid search."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from analysis.io.study import load
from analysis.report import build, cell_curves
from tests.tune.helpers import Caught
from tune.backend.inline import Inline
from tune.errors import StudyError
from tune.plan import probe, space, time, work
from tune.run import ledger
from tune.run.study_run import StudyRun
from tune.run.tables import write_tables
from tune.study import sizes
from tune.study.files import dump, parse
from tune.subject.known import Known

torch.set_num_threads(1)
GRID = """
question: Is it better?
tokenizer: {vocab_size: 300}
model: {n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16}
fixed: {tokens: 640, batch_tokens: 64, eval_windows: 4}
nuisance: {lr: {choice: [1.0e-3, 1.0e-2]}, warmup: {choice: [0.0, 0.1, 0.2]}}
search: {sampler: grid, trials_per_arm: 6, pruner: none}
stages: [search]
arms:
  gelu: {baseline: true}
"""
MINE = "  mine: {gate: sigmoid, alpha: 0.5}\n"


def play(study, folder=None, until=math.inf):
    """Train a study, or `until` so many cells, whose test loss is 3 + learning rate + warmup. Return its run.

    `folder` gets the study, its ledger and its tables.
    """
    interruption = Caught(until)

    def test(cell):
        return 3 + cell.config["lr"] + cell.config.get("warmup", 0.0)

    subject = Known(study, lambda cell, share: test(cell) + 0.1 / share, test)
    run = StudyRun(study, folder, subject, listen=interruption.ended, interruption=interruption)
    Inline().train(run)
    run.close()
    if folder:
        write_tables(study.name, ledger.read(folder / "ledger.jsonl"), folder)
        (folder / "study.yaml").write_text(dump(study))
    return run


def cells_of(run):
    return [record.cell for record in run.records.values()]


def test_a_grid_is_every_combination_once_for_every_arm():
    study = parse(GRID + MINE, Path("x.yaml"))
    run = play(study)
    points = [(lr, warmup) for lr in (1e-3, 1e-2) for warmup in (0.0, 0.1, 0.2)]
    for arm in ("gelu", "mine"):
        mine = [cell for cell in cells_of(run) if cell.arm == arm]
        assert [(cell.config["lr"], cell.config["warmup"]) for cell in mine] == points
        assert {(cell.stage, cell.seed) for cell in mine} == {("search", 1)}
    assert run.stages.finished
    assert run.stages.remaining() == 0
    chosen = [event for event in run.ledger.events if event["event"] in ("grid", "chosen")]
    assert [(event["event"], event["arm"], event["config"]) for event in chosen] == [
        ("chosen", arm, {"lr": 1e-3, "warmup": 0.0}) for arm in ("gelu", "mine")
    ]
    assert [[study.tests(stage) for stage in ("search", "calibrate", "confirm")]] == [[True, False, False]]


def test_a_grid_that_was_interrupted_goes_on_with_what_is_left(tmp_path):
    study = parse(GRID, Path("x.yaml"))
    assert play(study, tmp_path, until=4).ended == 4
    again = play(study, tmp_path)
    assert cells_of(again) == cells_of(play(study))
    assert sum(event["event"] == "started" for event in again.ledger.events) == 6


def test_a_study_may_confirm_the_best_of_its_search_without_a_grid_of_rates():
    study = parse(GRID.replace("[search]", "[search, confirm]") + MINE + "confirm: {seeds: 3}", Path("x.yaml"))
    run = play(study)
    cells = cells_of(run)
    assert [(cell.stage, cell.arm, cell.seed) for cell in cells[12:]] == [
        ("confirm", arm, seed) for seed in (101, 102, 103) for arm in ("gelu", "mine")
    ]
    assert {(cell.config["lr"], cell.config["warmup"]) for cell in cells[12:]} == {(1e-3, 0.0)}
    assert run.stages.finished
    assert run.stages.remaining() == 0


@pytest.mark.parametrize("stages", ["[search]", "[search, calibrate]", "[search, confirm]"])
def test_the_plan_counts_the_stages_that_there_are(stages):
    study = parse(GRID.replace("[search]", stages) + MINE + "confirm: {seeds: 3}", Path("x.yaml"))
    cells = cells_of(play(study))
    models = {arm: work.arm_model(study, arm, 300) for arm in study.arms}
    rows = work.work(study, models, sizes.confirm_seeds(study))
    counted = {(row.stage, row.arm): row.cells for row in rows}
    played = Counter((cell.stage, cell.arm) for cell in cells)
    for key, (least, _, most) in counted.items():
        assert least <= played[key] <= most
        assert (most == 0) == (not study.runs(key[0]))
    assert len(cells) <= space.most_cells(study)
    speeds = {arm: probe.Speed(1000.0, 0.1, 0.1) for arm in study.arms}
    seconds = time.stage_seconds(study, speeds, 2, sizes.confirm_seeds(study), 0.0, 0.0)
    assert {stage: span[2] > 0 for stage, span in seconds.items()} == {s: study.runs(s) for s in seconds}


@pytest.mark.parametrize("arms", ["", MINE], ids=["one arm", "two arms"])
def test_a_study_that_only_searches_is_reported_and_decides_nothing(arms, tmp_path):
    study = parse(GRID + arms, tmp_path / "grid.yaml")
    play(study, tmp_path)
    page = build.build(tmp_path).read_text()
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    said = [row["verdict"] for row in verdict["comparisons"]]
    assert said == ["not testable (no confirm stage: one seed a configuration)"] * (len(study.arms) - 1)
    assert [row["p_adjusted"] for row in verdict["comparisons"]] == [None] * len(said)
    assert "nothing is tested or decided" in page
    assert "Confirmation:" not in page
    assert "Calibration:" not in page
    drawn = cell_curves.lines(load(tmp_path))
    assert [(arm, rank) for arm, rank, _, _ in drawn] == [(arm, rank) for arm in study.arms for rank in range(4)]
    assert [label for _, _, label, _ in drawn[:2]] == ["gelu, lr 1.0e-03", "gelu, lr 1.0e-02"]
    assert drawn[1][3]["val_nll"].tolist() == pytest.approx([3.01 + 1 / step for step in range(1, 11)])
    assert "one line per configuration, each with one seed" in page


BAD_GRIDS = {
    "a range": (
        GRID.replace("warmup: {choice: [0.0, 0.1, 0.2]}", "warmup: {uniform: [0.0, 0.2]}"),
        "search.sampler: grid takes choices only; arm 'gelu' searches a range of warmup",
    ),
    "a number of trials": (
        GRID.replace("trials_per_arm: 6", "trials_per_arm: 5"),
        "search.trials_per_arm=5 is not the 6 combinations that arm 'gelu' has",
    ),
    "an order": (GRID.replace("[search]", "[confirm, search]"), "must be search, then calibrate or confirm or both"),
    "no search": (GRID.replace("[search]", "[confirm]"), "stages ['confirm'] must be search"),
    "a stage twice": (GRID.replace("[search]", "[search, search]"), "must be search, then"),
    "one arm to confirm": (GRID.replace("[search]", "[search, confirm]"), "at least one arm to compare with it"),
}


@pytest.mark.parametrize(("text", "message"), BAD_GRIDS.values(), ids=BAD_GRIDS.keys())
def test_a_bad_grid_is_one_line(text, message):
    with pytest.raises(StudyError) as caught:
        parse(text, Path("x.yaml"))
    assert message in str(caught.value)
