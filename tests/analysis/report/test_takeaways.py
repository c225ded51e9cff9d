"""Compare the sentence of each figure with numbers computed from the tables in another way."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from analysis.describe.curves import Trend
from analysis.io.study import load
from analysis.report import build, cell_curves, takeaways
from analysis.report.figures import drawn
from analysis.report.findings import Findings
from analysis.verdict.decide import decide
from analysis.verdict.kinds import Comparison, Refusal, Verdict
from analysis.verdict.summary import summarise

BUILT_IN = SimpleNamespace(own=None, turn=1, margin="0.5%", unit="nats")


@pytest.fixture
def said(demo):
    study = load(demo)
    return study, {name: figure.takeaway for name, figure in drawn(Findings(study)).items()}


def test_every_figure_of_a_study_has_its_sentence(demo, said):
    _, sentences = said
    text = build.build(demo).read_text()
    for sentence in sentences.values():
        assert f"<strong>{sentence}</strong>" in text
        assert sentence.endswith(".")


def test_arms_stand_by_their_verdict(said):
    assert said[1]["differences"] == "Worse: linear-floor and paglu-per-layer. Better: paglu-searched."


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([Verdict.UNDECIDED, Verdict.UNDECIDED], "Undecided: a and b."),
        ([Verdict.BETTER, Verdict.BETTER, Verdict.BETTER], "Better: a, b and c."),
        ([Verdict.NOT_TESTABLE, Verdict.IDENTICAL], "Not testable: a. Identical: b."),
        ([Verdict.NO_DIFFERENCE], "No difference larger than 0.5%: a."),
        ([], ""),
    ],
)
def test_details_of_a_verdict_stay_in_the_table(kinds, expected):
    rows = [Comparison(arm, "gelu", 1, kind=kind) for arm, kind in zip("abc", kinds, strict=False)]
    for row in rows:
        row.refusal = Refusal.ONE_SEED if row.kind is Verdict.NOT_TESTABLE else None
    assert takeaways.differences(rows, BUILT_IN) == expected


def test_the_ends_of_the_curves_are_those_of_the_table(said):
    study, sentences = said
    ends = study.curves[(study.curves["stage"] == "confirm") & (study.curves["step"] == 200)]
    by_arm = {arm: rows["val_nll"].to_numpy() for arm, rows in ends.groupby("arm")}
    low, high = min(by_arm, key=lambda a: by_arm[a].mean()), max(by_arm, key=lambda a: by_arm[a].mean())
    spread = max(np.ptp(losses) for losses in by_arm.values())
    assert sentences["loss_curves"] == (
        f"At the end {low} has the lowest mean, {by_arm[low].mean():.3f} nats per token, and {high} the highest, "
        f"{by_arm[high].mean():.3f}; seeds of one arm lie up to {spread:.3f} apart."
    )
    assert (low, high) == ("paglu-searched", "linear-floor")


def test_optima_inside_the_grid_and_at_its_end(said):
    found = re.fullmatch(
        r"Every arm has its optimum inside the grid, between ([\d.]+) and ([\d.]+)\.", said[1]["learning_rate"]
    )
    assert found
    assert 1e-3 < float(found[1]) <= float(found[2]) < 4e-3  # the grid's ends; the bowl's bottom is at 2e-3
    inside = {"nuisance": "lr", "at_edge": "no", "fitted": 2e-3, "bracketed": "yes"}
    rows = [{**inside, "arm": "a", "at_edge": "yes"}, {**inside, "arm": "b"}]
    assert takeaways.learning_rate(rows) == "The optimum of a is at an end of the grid, and may lie beyond it."
    rows = [{**inside, "arm": "a", "bracketed": "no: divergence next to it"}, {**inside, "arm": "b"}]
    assert takeaways.learning_rate(rows) == (
        "The optimum of a (divergence next to it) has no finite point on each side, and is uncertain."
    )
    assert takeaways.learning_rate([]) == ""
    decay = {**inside, "nuisance": "weight_decay", "fitted": 0.1, "arm": "a"}
    assert takeaways.learning_rate([{**inside, "arm": "a"}, {**decay, "at_edge": "yes"}]) == (
        "The optimum of a (weight_decay) is at an end of its grid, and may lie beyond it."
    )
    assert takeaways.learning_rate([{**inside, "arm": "a"}, {**decay, "bracketed": "no: too few finite points"}]) == (
        "The optimum of a (weight_decay, too few finite points) has no finite point on each side, and is uncertain."
    )
    assert takeaways.learning_rate([{**inside, "arm": "a"}, decay]) == (
        "Every arm has its optimum inside its grids, learning rate 0.002."
    )


def test_alphas_name_their_lowest_and_highest_layer(said):
    study, sentences = said
    runs = study.trials[(study.trials["stage"] == "confirm") & (study.trials["arm"] == "paglu-per-layer")]
    first, last = runs["alpha_layer_0"].mean(), runs["alpha_layer_3"].mean()
    expected = f"Mean alpha at the end: paglu-per-layer from {first:.2f} (layer 0) to {last:.2f} (3)."
    assert sentences["alphas"] == expected
    same = [{"arm": "one", "layer": layer, "mean": 0.97 + 0.001 * layer} for layer in range(3)]
    assert takeaways.by_layer(same) == "Mean alpha at the end: one at 0.97 in every layer."


def test_trends_are_grouped_and_what_cannot_be_tested_is_left_out():
    trends = {"a": Trend.RISES, "b": Trend.FALLS, "c": Trend.RISES, "d": Trend.NONE, "e": None}
    rows = [{"arm": arm, "trend": trend} for arm, trend in trends.items()]
    assert takeaways.over_training(rows) == (
        "Over training the improvement rises for a and c; falls for b; is undecided for d."
    )
    assert takeaways.over_training(rows[-1:]) == ""


def test_the_last_search_trials_gain():
    rows = [
        *({"arm": "a", "without_replacement": x} for x in (3.3, 3.2, 3.1)),
        *({"arm": "b", "without_replacement": x} for x in (3.4, 3.2, 3.19)),
        *({"arm": "c", "without_replacement": x} for x in (3.4, None, np.inf)),
    ]
    gain = 100 * (3.2 - 3.1) / 3.1
    assert takeaways.search_budget(rows, BUILT_IN) == (
        f"The last search trial lowered the expected best loss by at most {gain:.2f}% (a)."
    )
    assert takeaways.search_budget(rows[:1], BUILT_IN) == ""


def test_the_lowest_point_of_the_fit_over_alpha():
    rows = [{"arm": "a", "alpha": x / 4, "loss": (x / 4 - 1.25) ** 2} for x in range(9)]
    assert takeaways.against_alpha(rows) == "The fit is lowest for a at 1.25."
    assert takeaways.against_alpha([]) == ""


def test_looks_say_how_many_arms_were_decided():
    path = [{"n": 5}]
    rows = [
        Comparison("a", "gelu", 5, kind=Verdict.BETTER, path=path),
        Comparison("b", "gelu", 8, kind=Verdict.UNDECIDED, path=path),
        Comparison("c", "gelu", 8, kind=Verdict.WORSE),
    ]
    assert takeaways.sequential(rows) == "1 of 2 arms were decided, with 5 seeds."
    assert takeaways.sequential([*rows, replace(rows[0], n=7)]) == "2 of 3 arms were decided, with 5 to 7 seeds."
    assert takeaways.sequential(rows[1:]) == "0 of 1 arms were decided."


def test_a_study_without_confirm_runs_names_its_lowest_configuration(demo):
    trials, curves = (pd.read_parquet(demo / f"{name}.parquet") for name in ("trials", "curves"))
    for name, table in (("trials", trials), ("curves", curves)):
        table[table["stage"] == "search"].to_parquet(demo / f"{name}.parquet")  # one seed per configuration
    study = load(demo)
    ends = study.curves[study.curves["step"] == 200]
    assert f"{ends['val_nll'].min():.3f} nats per token." in takeaways.lowest_cell(cell_curves.lines(study), study)
    assert takeaways.loss_curves(study) == ""


def test_the_summary_is_its_parts(demo):
    study = load(demo)
    result = decide(study)
    said = summarise(result.comparisons, study, result.sensitivity, "")
    assert said.head == "With 8 seeds (a claim needs 8), against gelu, on test_nll:"
    assert [part.split(":")[0] for part in said.parts] == ["paglu-searched", "paglu-per-layer"]
    assert said.after.startswith("The floor linear-floor loses by 4.")
    assert str(said) == f"{said.head} {said.parts[0]}; {said.parts[1]}. {said.after}" == result.summary
    text = build.build(demo).read_text()
    assert all(f"<li>{part}</li>" in text for part in said.parts)
