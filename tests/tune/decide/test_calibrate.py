"""The calibrate stage with several hyperparameters, next to a divergence, and on ledgers of the former version."""

import json
import math
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from analysis.describe import calibration
from analysis.io.assemble import assemble
from analysis.report.build import terminal_table
from analysis.report.findings import Findings
from analysis.report.methods import would_change
from analysis.stats.optimum import bends, optima
from analysis.verdict import decide as verdicts
from tests.studies import SMALL, changed, study_of
from tune.backend.inline import Inline
from tune.cli.next_steps import next_steps
from tune.decide.calibrate import FORM, form_of
from tune.decide.stages import Stages
from tune.run.study_run import StudyRun
from tune.run.tables import tables
from tune.subject.known import Known

ARMS = ("gelu", "floor", "one")
STUDY = changed(
    SMALL,
    nuisance={"weight_decay": {"loguniform": [0.01, 1.0]}},
    arms={"mine": None, "searched": None, "one": {"gate": "tanh", "alpha": 0.5}},
    search={"trials_per_arm": 4},
    calibrate={"points": 3, "seeds": 2, "max_points": 9},
    confirm={"seeds": 3},
)
OPTIMA = {"gelu": (1e-3, 0.1), "floor": (1e-3, 0.1), "one": (2e-3, 0.05)}


def bowl(cell, optima=OPTIMA, interaction=0.8, diverges=math.inf, noise=0.0):
    """Return a loss with an interaction of the two hyperparameters, above a rate of `diverges` optima infinite."""
    rate, decay = optima[cell.arm]
    x, y = math.log(cell.config["lr"] / rate), math.log(cell.config.get("weight_decay", decay) / decay)
    if x > math.log(diverges):
        return math.inf
    drawn = np.random.default_rng([cell.seed, *f"{cell.arm}{cell.config_key}".encode()]).normal() * noise
    return 3.0 + 0.06 * x * x + 0.02 * y * y + 2 * interaction * math.sqrt(0.06 * 0.02) * x * y + drawn


def drive(loss=bowl, added=(), form=FORM, **changes):
    """Return the stages, the cells and the decisions of a study whose trials `loss` gives, up to the confirm stage."""
    decisions, cells = [], []
    study = study_of(STUDY, **changes)
    stages = Stages(study, lambda event, **fields: decisions.append((event, fields)), {}, added, form=form)
    while not stages.finished:
        cells.append(cell := stages.next_cell())
        found = loss(cell)
        stages.complete(cell, "completed" if math.isfinite(found) else "infeasible", found, 10)
    return stages, cells, decisions


def of(decisions, kind):
    return [fields for event, fields in decisions if event == kind]


def test_every_hyperparameter_of_every_arm_has_its_joint_optimum():
    stages, cells, decisions = drive()
    for arm, (rate, decay) in OPTIMA.items():  # an exact quadratic has no error but that of rounding
        assert stages.chosen[arm]["lr"] == pytest.approx(rate, rel=2e-3)
        assert stages.chosen[arm]["weight_decay"] == pytest.approx(decay, rel=5e-3)
    assert [fields["nuisance"] for fields in of(decisions, "grid")][:1] == ["lr"]
    assert all(fields["unbracketed"] == {} for fields in of(decisions, "chosen"))
    calibrated = [cell for cell in cells if cell.stage == "calibrate"]
    assert {cell.axis for cell in calibrated} == {"lr", "weight_decay", "corners"}
    assert len({cell.key for cell in cells}) == len(cells)
    for axis, name in (("lr", "lr"), ("weight_decay", "weight_decay")):  # shared values, whatever the arm
        values = [{c.config[name] for c in calibrated if (c.axis, c.arm) == (axis, arm)} for arm in ARMS]
        assert values[0] == values[1] == values[2]
        assert len(values[0]) >= 3


def test_one_after_the_other_alone_would_miss_the_optimum():
    """Without the corners, each arm stays off its optimum by another distance, by which the confirm stage errs."""
    _, _, decisions = drive()
    before = of(decisions, "corners")[0]["best"]
    missed = [abs(math.log(before[arm]["weight_decay"] / decay)) for arm, (_, decay) in OPTIMA.items()]
    assert max(missed) > 0.2


def test_the_best_points_of_the_grids_may_be_chosen_instead():
    stages, cells, decisions = drive(calibrate={"choice": "grid"})
    assert "corners" not in {cell.axis for cell in cells}
    grids = {fields["nuisance"]: fields["grid"] for fields in of(decisions, "grid")}
    assert all(stages.chosen[arm][name] in grid for name, grid in grids.items() for arm in ARMS)


def test_an_added_arm_runs_on_the_points_of_the_others_and_leaves_their_choices():
    first, before, _ = drive(arms={"one": None})
    stages, cells, _ = drive(added=[["one"]])
    assert {arm: stages.chosen[arm] for arm in ("gelu", "floor")} == first.chosen
    for name in ("lr", "weight_decay"):
        old = {c.config[name] for c in before if c.axis == name}
        assert old <= {c.config[name] for c in cells if c.axis == name and c.arm == "one"}
    assert stages.chosen["one"]["weight_decay"] == pytest.approx(0.05, rel=0.02)


def test_remaining_never_counts_too_few_first_points_and_ends_at_nothing():
    study = study_of(STUDY)
    stages = Stages(study, lambda event, **fields: None, {})
    assert stages.remaining() == 3 * (4 + (3 + 3 + 2) * 2 + 3)
    stages, cells, _ = drive()
    assert stages.remaining() == 0
    assert sum(cell.stage == "calibrate" for cell in cells) >= 3 * (3 + 3 + 2) * 2


def test_an_optimum_that_moves_until_the_last_round_is_named_in_the_ledger_and_in_the_verdict(monkeypatch):
    optima = dict.fromkeys(ARMS, (1e-3, 0.1))

    def loss(cell, share=1.0):
        if cell.stage == "search":  # its trials lead far up the valley
            return bowl(cell, dict.fromkeys(ARMS, (1e-2, 0.003)), 0)
        return bowl(cell, optima, 0.8, noise=1e-4) + (0.5 if cell.arm == "floor" else 0.0)

    study, found = study_of(STUDY), {}
    for rounds in (1, 5):
        monkeypatch.setattr("tune.decide.calibrate.MOST_ROUNDS", rounds)
        run = StudyRun(study, None, Known(study, loss, loss))
        Inline().train(run)
        chosen = {event["arm"]: event["unbracketed"] for event in run.ledger.events if event["event"] == "chosen"}
        rows, _ = tables("x", run.ledger.events)
        result = verdicts.decide(assemble("x", "x", rows, pd.DataFrame(), study.model_dump()))
        row = next(row for row in result.comparisons if row.arm == "one")
        assert row.unbracketed == {arm: chosen[arm] for arm in ("gelu", "one") if chosen[arm]}
        found[rounds] = row.unbracketed.get("one")
    assert found == {1: {"lr": "end of the grid"}, 5: None}


@pytest.mark.parametrize("factor", [1.3, 1.5])
def test_points_are_inserted_until_each_optimum_has_finite_neighbours(factor):
    one = {"nuisance": {"weight_decay": None}}
    stages, _, decisions = drive(lambda cell: bowl(cell, diverges=factor, interaction=0), **one)
    for arm, (rate, _) in OPTIMA.items():
        means = {value: stages.calibration.mean(arm, {"lr": value}) for value in stages.calibration.grid}
        best = min(means, key=means.get)
        around = sorted(means)[sorted(means).index(best) - 1 :][:3]
        assert all(math.isfinite(means[value]) for value in around)
        assert stages.chosen[arm]["lr"] == pytest.approx(rate, rel=1e-3)
    assert all(fields["unbracketed"] == {} for fields in of(decisions, "chosen"))
    ratios = np.diff(np.log(stages.calibration.grid))
    assert ratios.min() < math.log(2) * 0.6  # an inserted point; the others are a factor 2 apart


@pytest.mark.parametrize("which", ["one", "floor"])
def test_an_arm_without_finite_neighbours_says_so_wherever_its_verdict_is_shown(which):
    """The floor too: it gates the verdicts on all other arms."""
    one = {"nuisance": {"weight_decay": None}, "calibrate": {"max_points": 5}, "confirm": {"seeds": 6}}
    study, optima = study_of(STUDY, **one), dict.fromkeys(ARMS, (1e-3, 1))

    def loss(cell, share=1.0):
        at = bowl(cell, optima, 0, 1.2 if cell.arm == which else math.inf, noise=0.01)
        at += 1.0 if cell.arm == "floor" else 0.0
        return at if cell.stage != "search" else 3.0 + abs(math.log(cell.config["lr"] / 1e-3))

    run = StudyRun(study, None, Known(study, loss, loss))
    Inline().train(run)
    chosen = {event["arm"]: event["unbracketed"] for event in run.ledger.events if event["event"] == "chosen"}
    assert chosen == {arm: {"lr": "divergence next to it"} if arm == which else {} for arm in ARMS}
    rows, _ = tables("x", run.ledger.events)
    read = assemble("x", "x", rows, pd.DataFrame(), study.model_dump())
    result = verdicts.decide(read)
    (row,) = (row for row in result.comparisons if row.arm == which)
    assert row.unbracketed == {which: chosen[which]}
    said = f"the best learning rate of {which} has no finite neighbour on each side"
    assert f"{said} (divergence next to it), so its optimum is uncertain" in row.why
    warning = f"Warning: no bracket around the best learning rate (divergence next to it) of {which}."
    assert warning in result.summary
    console = Console(width=100, record=True, file=StringIO())
    console.print(terminal_table(result, 100))
    assert warning in " ".join(console.export_text().split())  # the title is wrapped
    first = study.confirm.first_seed
    (step,) = (line for line in next_steps(result, study, "r", "") if line.startswith("To bracket"))
    assert step == (
        f"To bracket the optimum of {which}: confirm.first_seed: {first} -> {first + 6} and calibrate.max_points: "
        "5 -> 9, under another name"
    )
    (line,) = (line for line in would_change(Findings(read)) if line.startswith("More points"))
    assert line == f"More points: the best learning rate (divergence next to it) of {which} has no finite " + (
        "neighbour on each side."
    )


@pytest.mark.parametrize("changes", [{"stages": ["search", "confirm"]}, {}])
def test_what_is_searched_but_not_calibrated_is_said(changes):
    study = study_of(STUDY, **changes, confirm={"seeds": 6})

    def loss(cell, share=1.0):
        return bowl(cell, noise=0.01) + (1.0 if cell.arm == "floor" else 0.0)

    run = StudyRun(study, None, Known(study, loss, loss))
    Inline().train(run)
    rows, _ = tables("x", run.ledger.events)
    result = verdicts.decide(assemble("x", "x", rows, pd.DataFrame(), study.model_dump()))
    (row,) = (row for row in result.comparisons if row.arm == "one")
    assert row.uncalibrated == (["lr", "weight_decay"] if changes else [])
    assert ("learning rate and weight_decay were searched, not calibrated" in result.summary) == bool(changes)
    assert ("equal arms may differ more often than the level allows" in row.why) == bool(changes)


def test_a_study_of_the_learning_rate_alone_is_as_before_several_nuisances_existed():
    """The record was made by the code before: every cell with its loss, the grids, the choices and the verdict."""
    before = json.loads(Path(__file__).with_name("one_nuisance.json").read_text())
    study = study_of(SMALL, **before["study"])
    losses = {key: math.inf if loss is None else loss for key, _, loss in before["cells"]}

    def loss(cell, share=1.0):
        return losses[cell.key]  # another cell than before is an error

    run = StudyRun(study, None, Known(study, loss, loss))
    Inline().train(run)
    assert [[key, r.outcome, (r.final or {}).get("val_nll")] for key, r in run.records.items()] == before["cells"]
    events = run.ledger.events
    assert [event["grid"] for event in events if event["event"] == "grid"] == before["grids"]
    chosen = {event["arm"]: event["config"] for event in events if event["event"] == "chosen"}
    assert chosen == {arm: {"lr": rate} for arm, rate in before["chosen"].items()}
    rows, _ = tables("x", events)
    result = verdicts.decide(assemble("x", "x", rows, pd.DataFrame(), study.model_dump()))
    for row, old in zip(result.comparisons, before["comparisons"], strict=True):
        assert (row.arm, row.kind) == (old["arm"], old["kind"])
        assert row.p_adjusted == pytest.approx(old["p_adjusted"], rel=1e-9)
        assert row.improvement_percent == pytest.approx(old["improvement_percent"], rel=1e-9)


def test_a_ledger_of_the_former_version_keeps_its_cells(tmp_path: Path):
    stages, cells, decisions = drive(form=1)
    assert {cell.axis for cell in cells} == {""}
    assert all(set(fields) == {"grid", "best"} for fields in of(decisions, "grid"))
    assert all("unbracketed" not in fields for fields in of(decisions, "chosen"))
    best = {arm: stages.search[arm].best() for arm in ARMS}
    assert all(stages.chosen[arm]["weight_decay"] == best[arm]["weight_decay"] for arm in ARMS)
    # a new run of such a ledger finds the same cells in it, and decides nothing again
    study = study_of(STUDY)
    (tmp_path / "x").mkdir()
    run = StudyRun(study, tmp_path / "x", Known(study, lambda cell, share: bowl(cell), bowl))
    run.stages = Stages(study, run._decided, {}, form=1)
    run._first = run._next_missing()
    Inline().train(run)
    run.close()
    again = StudyRun(study, tmp_path / "x", Known(study, lambda cell, share: bowl(cell), bowl))
    assert not again.missing
    kinds = [event["event"] for event in again.ledger.events]
    assert kinds.count("chosen") == 3
    assert kinds.count("suggested") == len(cells)
    again.close()


ONE_SEED = {"calibrate": {"points": 4, "seeds": 1, "max_points": 7}, "nuisance": {"weight_decay": None}}


def test_one_selection_seed_has_the_noise_that_the_arms_show_together():
    noisy = lambda cell: bowl(cell, noise=0.02)  # noqa: E731
    _, cells, decisions = drive(noisy, **ONE_SEED)
    rates = of(decisions, "grid")[-1]["grid"]
    tables = {arm: np.array([[noisy(cell_at(cells, arm, rate))] for rate in rates]) for arm in ARMS}
    now = {fields["arm"]: fields["config"]["lr"] for fields in of(decisions, "chosen")}
    assert now == {arm: float(f"{one.rate:.4g}") for arm, one in optima(rates, tables).items()}
    before = {fields["arm"]: fields["config"]["lr"] for fields in of(drive(noisy, form=2, **ONE_SEED)[2], "chosen")}
    assert before == {arm: float(f"{one.rate:.4g}") for arm, one in optima(rates, tables, bent=False).items()}
    assert now != before


def test_the_report_has_the_noise_of_one_selection_seed():
    def loss(cell, share=1.0):
        return bowl(cell, noise=0.004) + (0.2 if cell.arm == "floor" else 0.0)

    shown = {}
    for points in (4, 3):  # three points show none
        changes = {**ONE_SEED, "calibrate": {"points": points, "seeds": 1, "max_points": points}}
        study = study_of(STUDY, **changes)
        run = StudyRun(study, None, Known(study, loss, loss))
        Inline().train(run)
        rows, _ = tables("x", run.ledger.events)
        read = assemble("x", "x", rows, pd.DataFrame(), study.model_dump())
        shown[points] = [row["standard_error"] for row in calibration.optimum_rows(read)]
        grid = rows[rows["stage"] == "calibrate"].pivot(index="lr", columns="arm", values="val_nll").sort_index()
    losses = {arm: grid[arm].to_numpy()[:, None] for arm in ARMS}
    assert bends(list(grid.index), losses) == 0
    assert shown[3] == [None] * 3
    assert len({*shown[4]}) == 1
    assert 0.001 < shown[4][0] < 0.02


def cell_at(cells, arm, rate):
    return next(c for c in cells if (c.stage, c.arm, c.config["lr"]) == ("calibrate", arm, rate))


def test_a_ledger_with_one_selection_seed_keeps_the_choice_that_it_began_with():
    grids = of(drive(**ONE_SEED)[2], "grid")
    assert form_of(grids, seeds=1) == FORM == 3
    assert form_of([{key: grid[key] for key in grid if key != "form"} for grid in grids], seeds=1) == 2
    assert form_of([{"grid": [1.0]}], seeds=1) == form_of([{"grid": [1.0]}], seeds=2) == 1
    assert form_of(of(drive()[2], "grid"), seeds=2) == form_of([], seeds=1) == FORM
    assert all("form" not in grid for grid in of(drive()[2], "grid"))


def test_the_report_tells_the_shared_values_of_each_hyperparameter_and_the_one_that_was_confirmed():
    study = study_of(STUDY, confirm={"seeds": 8})

    def loss(cell, share=1.0):
        return bowl(cell, noise=0.004) + (0.2 if cell.arm == "floor" else 0.0)

    run = StudyRun(study, None, Known(study, loss, loss))
    Inline().train(run)
    rows, _ = tables("x", run.ledger.events)
    read = assemble("x", "x", rows, pd.DataFrame(), study.model_dump())
    table = calibration.optimum_rows(read)
    assert [(row["nuisance"], row["arm"]) for row in table] == [(n, a) for n in ("lr", "weight_decay") for a in ARMS]
    assert "nuisance" in calibration.columns(table)
    grids = {event["nuisance"]: event["grid"] for event in run.ledger.events if event["event"] == "grid"}
    before = next(event for event in run.ledger.events if event["event"] == "corners")["best"]
    for row in table:
        assert row["points"] == len(grids[row["nuisance"]])  # corners belong to no grid
        assert row["chosen"] == run.stages.chosen[row["arm"]][row["nuisance"]]
        assert row["fitted"] == pytest.approx(before[row["arm"]][row["nuisance"]], rel=1e-3)  # as calibrate fitted it
    assert sorted({row["lr"] for row in calibration.at_grid(read)}) == pytest.approx(grids["lr"])
