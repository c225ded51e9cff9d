"""Tests of the advice after a verdict: its numbers follow from the verdict, and the study file accepts them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.io.assemble import assemble
from analysis.stats import power
from analysis.verdict.decide import decide
from analysis.verdict.kinds import Rung
from analysis.verdict.ladder.kinds import ArmTrend, Trend
from tests.own_trainings import own_yaml
from tests.studies import SMALL, changed, study_of
from tests.tune.decide.ladders import ladder_of
from tune.cli.next_steps import MOST_SEEDS, _longer, next_steps, to_change
from tune.errors import StudyError
from tune.study.files import parse

STUDY = changed(
    SMALL,
    fixed={"tokens": 4096},
    arms={"mine": None, "one": {"gate": "tanh", "alpha": 0.5}, "two": {"gate": "tanh", "alpha": 1.0}},
    confirm={"seeds": 6},
)


def study(**changes):
    return study_of(STUDY, **changes)


def result(plan, one, two, floor=0.5, seeds=6):
    """Return the verdict on known differences. `one` and `two` are mean and sd of gelu's loss minus theirs, in nats."""
    draw = np.random.default_rng(3)
    base = 4 + 0.01 * draw.normal(size=seeds)
    rows = [("gelu", seed, loss) for seed, loss in enumerate(base)]
    for arm, (mean, sd) in {"floor": (-floor, 0.01), "one": one, "two": two}.items():
        noise = draw.normal(size=seeds)
        noise = (noise - noise.mean()) / noise.std(ddof=1)
        rows += [(arm, seed, loss) for seed, loss in enumerate(base - mean - sd * noise)]
    table = pd.DataFrame(rows, columns=["arm", "seed", "test_nll"]).assign(stage="confirm", outcome="completed")
    settings = plan.model_dump()
    read = assemble("x", "x", table, pd.DataFrame(), settings, baseline="gelu", floor="floor")
    return decide(read)


UNSURE, CLEAR, TINY = (0.025, 0.04), (0.1, 0.01), (0.019, 0.4)


SPENT = "this study has spent its level: a look at added seeds would err more often."


def test_a_study_with_a_reserve_names_the_seeds_that_decide_at_the_level_of_its_next_look():
    plan = study(confirm={"reserve": 0.2})
    found = result(plan, UNSURE, CLEAR)
    row = next(row for row in found.comparisons if row.arm == "one")
    assert row.verdict.startswith("undecided (needs about ")
    d_z, level = UNSURE[0] / UNSURE[1], row.level_of_first_step * 0.1
    enough = next(
        n
        for n in range(2, 1000)
        if max(power.power(d_z, n, level), power.tost_power(d_z, row.margin / UNSURE[1], n, level)) >= 0.8
    )
    assert row.seeds_needed == enough > 6
    assert to_change(found, plan) == [
        f"To decide one: confirm.seeds: 6 -> {enough}, then the same command: only the new seeds are trained"
    ]


def test_a_study_that_has_spent_its_level_is_never_told_to_add_seeds():
    found = result(study(), UNSURE, CLEAR)
    (line,) = to_change(found, study())
    assert line.startswith(f"one: undecided, and {SPENT} Named before a study runs, confirm.reserve: 0.2 or")
    rule = study(confirm={"seeds": None, "rule": "obrien-fleming", "max_seeds": 8})
    (line,) = to_change(result(rule, UNSURE, CLEAR, seeds=8), rule)
    assert line.startswith(f"one: undecided at the last look of 8 seeds, and {SPENT}")
    (line,) = to_change(result(study(), CLEAR, CLEAR), study())
    assert line.startswith(f"6 seeds are preliminary. A claim needs 8, and {SPENT}")
    unpaired = study(confirm={"test": "welch"})  # it takes neither a reserve nor another rule
    (line,) = to_change(result(unpaired, UNSURE, CLEAR), unpaired)
    assert (
        line == f"one: undecided, and {SPENT} confirm.test: welch has one look, so give the number of seeds before a "
        "study runs"
    )


def test_the_widest_of_several_undecided_arms_counts():
    plan = study(confirm={"reserve": 0.2})
    found = result(plan, UNSURE, (0.02, 0.04))
    needed = [row.seeds_needed for row in found.comparisons if row.arm in ("one", "two")]
    assert to_change(found, plan)[0].startswith(f"To decide one, two: confirm.seeds: 6 -> {max(needed)}, then")


def test_more_seeds_than_a_study_takes_are_not_advised():
    plan = study(confirm={"reserve": 0.2})
    found = result(plan, TINY, CLEAR)
    (line,) = to_change(found, plan)
    assert line.startswith(f"one: needs more than {MOST_SEEDS} seeds. Longer trials")
    assert "->" not in line
    study(confirm={"seeds": MOST_SEEDS})
    with pytest.raises(StudyError, match=r"confirm\.seeds"):
        study(confirm={"seeds": MOST_SEEDS + 1})


def test_a_floor_that_no_number_of_seeds_tells_is_told_by_longer_trials_only():
    plan = study()
    found = result(plan, CLEAR, CLEAR, floor=0.01)
    assert found.sensitivity.too_few_seeds
    row = next(row for row in found.comparisons if row.arm == "floor")
    seeds = "confirm.first_seed: 101 -> 107 and confirm.seeds"
    row.seeds_needed = MOST_SEEDS
    first, second = to_change(found, plan)
    assert first.startswith(f"To tell the floor from gelu: {seeds}: 6 -> {MOST_SEEDS}")
    assert second.startswith("Or longer trials, in which the floor loses by more: ")
    row.seeds_needed += 1
    (line,) = to_change(found, plan)
    said = f"{MOST_SEEDS} seeds, the most of a study, are too few to tell the floor from gelu; longer trials, in which"
    assert line.startswith(said)


def test_a_ladder_becomes_longer_by_its_rungs():
    assert _longer(ladder_of()) == "tokens_per_parameter of each rung: 20 -> 80, under another name"
    rows = [{"tokens": 10**6 * n, "d_model": 16 * n} for n in (1, 2)]
    assert _longer(ladder_of(scales=rows)) == "tokens of each rung, times 4, under another name"


def test_a_floor_that_does_not_lose_asks_for_longer_trials():
    plan = study()
    (line,) = to_change(result(plan, CLEAR, CLEAR, floor=0.0), plan)
    assert line == (
        "To make arms differ by more than the noise: fixed.tokens: 4096 -> 16384, under another name (pagating "
        "plan says if a trial then reads its text more than once)"
    )


def test_splits_of_one_data_set_are_not_added_without_end():
    arms = {arm: {"set": {"shift": shift}} for arm, shift in (("gelu", 0.0), ("one", 0.1), ("two", 0.2))}
    arms["gelu"]["baseline"] = True
    gone = dict.fromkeys(("plain", "shifted", "short"))
    arms |= {"floor": {"of": "gelu", "budget": 0.5, "floor": True}, **gone}
    text = own_yaml(arms=arms, resampling={"test_share": 0.5}, confirm={"seeds": 6})
    plan = parse(text, Path("own.yaml"))
    found = result(plan, UNSURE, CLEAR)
    assert "needs more data" in next(row for row in found.comparisons if row.arm == "one").verdict
    (line,) = [line for line in to_change(found, plan) if line.startswith("one")]
    assert line.startswith("one: undecided, and this study has made its one look. More splits help up to a limit only")
    told = to_change(result(plan, CLEAR, CLEAR, floor=0.01), plan)
    assert "To tell the floor from gelu: a larger data set, because no number of splits is enough" in told


@pytest.mark.parametrize(
    ("trial", "said"),
    [
        ({}, "use trial.seed or trial.rng(NAME) in mine.py"),
        ({"trial": {"command": "run {lr} {shift} {seed} {budget} {test}"}}, "use the {seed} that the command is given"),
    ],
)
def test_seeds_that_change_nothing_are_to_be_used_before_a_trial_becomes_longer(trial, said):
    plan = parse(own_yaml(**trial), Path("own.yaml"))
    alike, apart = (
        pd.DataFrame(
            [
                (arm, seed, loss + spread * seed * (arm == "short"))
                for arm, loss in {"plain": 2.3, "shifted": 2.2, "short": 2.8}.items()
                for seed in range(101, 105)
            ],
            columns=["arm", "seed", "test_nll"],
        ).assign(stage="confirm", outcome="completed")
        for spread in (0.0, 1e-3)
    )
    (step,) = to_change(decide(assemble("x", "x", alike, pd.DataFrame(), plan.model_dump())), plan)
    assert step.startswith(f"To make seeds differ: {said} for the first weights")
    found = decide(assemble("x", "x", apart, pd.DataFrame(), plan.model_dump()))
    assert not any("seeds differ" in step for step in to_change(found, plan))


def test_an_end_of_the_grid_is_said_first():
    plan = study(confirm={"reserve": 0.2})
    found = result(plan, UNSURE, CLEAR)
    next(row for row in found.comparisons if row.arm == "two").at_edge = ["two"]
    lines = to_change(found, plan)
    points = plan.calibrate.max_points
    assert lines[0].startswith("To find the learning rate of two, which is an end of the grid: ")
    assert f"calibrate.max_points: {points} -> {points + 2}, under another name" in lines[0]
    assert "confirm.first_seed: 101 -> 107" in lines[0]  # the same seeds would be a second look at them
    assert lines[1].startswith("To decide one")


def test_a_floor_at_an_end_of_the_grid_is_said_even_if_it_refuses_every_arm():
    plan = study()
    found = result(plan, CLEAR, CLEAR, floor=0.0)
    next(row for row in found.comparisons if row.arm == "floor").at_edge = ["floor"]
    edge, longer = to_change(found, plan)
    assert edge.startswith("To find the learning rate of floor, which is an end of the grid: ")
    assert longer.startswith("To make arms differ by more than the noise")


def test_few_seeds_that_decide_are_no_claim_and_enough_of_them_are():
    plan = study(confirm={"reserve": 0.2})
    assert to_change(result(plan, CLEAR, CLEAR), plan)[0].startswith("For a claim: confirm.seeds: 6 -> 8, then")
    plan = study(confirm={"seeds": 8})
    assert to_change(result(plan, CLEAR, CLEAR, seeds=8), plan) == [
        "The verdict holds for this text, model and tokens; for others: corpus or model, under another name"
    ]


def test_the_cap_of_an_e_process_is_raised_up_to_the_largest_number_of_seeds():
    plan = study(confirm={"seeds": None, "rule": "e-process", "max_seeds": 6})
    found = result(plan, UNSURE, CLEAR)
    row = next(row for row in found.comparisons if row.arm == "one")
    assert "cap" in row.verdict
    for needed, cap in ((2, 12), (99, 99)):
        row.seeds_needed = needed
        wanted = f"To decide one: confirm.max_seeds: 6 -> {cap}, then the same command: only the new seeds are trained"
        assert to_change(found, plan)[0] == wanted
    last = study(confirm={"seeds": None, "rule": "e-process", "max_seeds": MOST_SEEDS})
    assert to_change(found, last)[0].startswith(f"one: needs more than {MOST_SEEDS} seeds.")


def test_a_study_without_confirm_is_told_to_have_one():
    plan = study(confirm=None, stages=["search", "calibrate"])
    assert to_change(result(plan, UNSURE, CLEAR), plan) == [
        "To decide: stages: [search, calibrate] -> [search, calibrate, confirm], under another name"
    ]


def test_the_steps_begin_with_the_report_and_the_trials():
    found = result(study(), UNSURE, CLEAR)
    steps = next_steps(found, study(), "studies/x/report.html", "make ui")
    assert steps[:2] == ["Report:  studies/x/report.html", "Browse the trials: make ui"]
    assert len(steps) == 3
    assert next_steps(found, study(), "r", "")[1] == "The trials were not sent to MLflow."


def test_the_steps_of_a_ladder_begin_with_their_rungs():
    plan = study()
    clear, unsure = result(plan, CLEAR, CLEAR), result(plan, UNSURE, CLEAR)
    trends = [ArmTrend("one", "gelu", label="one"), ArmTrend("two", "gelu", Trend.GROWS, label="two")]

    def steps(*each):
        rungs = [Rung(number, "", {}, None, None, None, found) for number, found in enumerate(each, 1)]
        return to_change(replace(each[-1], rungs=rungs, trends=trends), plan)

    trend = "Trend of one: a larger rung under scales, or more seeds per rung, under another name"
    (preliminary,), (undecided,) = to_change(clear, plan), to_change(unsure, plan)
    assert steps(clear, unsure, clear) == [f"Rungs 1 and 3: {preliminary}", f"Rung 2: {undecided}", trend]
    trends.pop(0)
    whole = study(confirm={"seeds": 8})
    every = result(whole, CLEAR, CLEAR, seeds=8)
    rungs = [Rung(1, "", {}, None, None, None, every)]
    assert to_change(replace(every, rungs=rungs, trends=trends), whole) == to_change(every, whole)
