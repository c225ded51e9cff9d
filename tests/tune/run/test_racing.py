"""Arms that stop when they are decided, and contrasts, which keep both of their arms going."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from analysis.io.assemble import assemble
from analysis.report.build import verdict_markdown
from analysis.report.findings import Findings
from analysis.report.methods import would_change
from analysis.report.takeaways import loss_curves
from analysis.verdict.decide import decide
from analysis.verdict.kinds import as_object
from tests.studies import study_of
from tests.tune.run.known_losses import GAIN, STUDY, decided, differences, loss, of, p_of, run, study, table
from tune.cli.next_steps import to_change
from tune.run.ledger import MemoryLedger
from tune.run.tables import tables


def test_an_arm_that_is_decided_stops_and_the_others_go_on_with_the_baseline():
    found = run(study(confirm={"seeds": None, "rule": "e-process", "margin": 1e-6}))
    seeds = {arm: sum(key.startswith(f"confirm/{arm}/") for key in found.records) for arm in GAIN}
    result = decided(found, found.study)
    rows = {row.arm: row for row in result.comparisons}
    assert seeds["gelu"] == seeds["two"] == 20
    assert seeds["linear-floor"] < seeds["one"] < 20
    assert {arm: row.n for arm, row in rows.items()} == {arm: n for arm, n in seeds.items() if arm != "gelu"}
    assert not rows["one"].dropped_seeds_baseline
    assert rows["one"].p_adjusted <= 0.05 < rows["two"].p_adjusted
    assert rows["one"].p_t == pytest.approx(p_of(differences(found, "one", seeds["one"])), rel=1e-9)
    assert not result.unfinished
    whole = run(study(confirm={"seeds": None, "rule": "e-process", "margin": 1e-6, "racing": False}))
    assert len(whole.records) - len(found.records) == 40 - seeds["one"] - seeds["linear-floor"]
    other = {row.arm: row for row in decided(whole, whole.study).comparisons}
    assert {arm: row.kind for arm, row in other.items()} == {arm: row.kind for arm, row in rows.items()}
    assert result.summary.startswith(f"With {seeds['one']} to 20 seeds by the rule e-process, ")


def test_means_of_arms_that_stopped_early_are_shown_over_the_seeds_that_all_ran():
    found = run(study(confirm={"seeds": None, "rule": "e-process", "margin": 1e-6}))
    rows, curves = tables("s", found.ledger.events)
    read = assemble("s", "s", rows, curves, found.study.model_dump())
    shared = min(row.n for row in decide(read).comparisons)
    ends = {arm: np.mean([loss(cell, 1.0) for cell in cells]) for arm, cells in first_cells(found, shared).items()}
    low, high = min(ends, key=ends.get), max(ends, key=ends.get)
    said = loss_curves(read)
    assert (
        f"{low} has the lowest mean, {ends[low]:.3f} nats per token, and {high} the highest, {ends[high]:.3f}" in said
    )
    assert "Means over different seeds cannot be compared" in verdict_markdown(decide(read))


def first_cells(run, n):
    """Return the confirm cells of each arm on the first n seeds."""
    cells = [record.cell for record in run.records.values() if record.cell.stage == "confirm"]
    return {arm: [cell for cell in cells if cell.arm == arm and cell.seed < 101 + n] for arm in GAIN}


def test_the_recorded_losses_of_a_real_study_are_decided_alike_with_fewer_trials():
    folder = Path(__file__).parents[3] / "docs" / "results" / "laptop-wikitext-2"
    recorded = pd.read_parquet(folder / "trials.parquet").query("stage == 'confirm'")
    losses = {(row.arm, row.seed): row.test_nll for row in recorded.itertuples()}
    arms = yaml.safe_load((folder / "study.yaml").read_text())["arms"]
    base = {key: value for key, value in STUDY.items() if key != "arms"} | {
        "arms": arms,
        "model": {**STUDY["model"], "n_layer": 4},
    }
    found = {}
    for racing in (True, False):
        plan = study_of(base, name="s", confirm={"seeds": None, "rule": "e-process", "max_seeds": 8, "racing": racing})
        found[racing] = run(plan, test=lambda cell, share: losses.get((cell.arm, cell.seed), 3.0))
    verdicts = {racing: decide(table(each)).comparisons for racing, each in found.items()}
    assert {row.arm: row.kind for row in verdicts[True]} == {row.arm: row.kind for row in verdicts[False]}
    trials = {racing: sum(key.startswith("confirm/") for key in each.records) for racing, each in found.items()}
    assert trials == {True: 52, False: 64}  # relu2 is decided at 5 seeds, and xsilu is not at 8
    assert {row.arm: row.n for row in verdicts[True]}["relu2"] == 5


def test_an_arm_that_does_not_differ_stops_too():
    found = run(study(confirm={"seeds": None, "rule": "obrien-fleming", "margin": 0.1}))
    seeds = {arm: sum(key.startswith(f"confirm/{arm}/") for key in found.records) for arm in GAIN}
    row = {row.arm: row for row in decided(found, found.study).comparisons}["two"]
    assert (row.kind, row.n) == ("no_difference", seeds["two"])
    assert seeds["two"] < 10
    d = differences(found, "two", row.n)
    t = [(0.1 + sign * d.mean()) / d.std(ddof=1) * math.sqrt(row.n) for sign in (1, -1)]
    assert row.p_tost == pytest.approx(stats.t.sf(min(t), row.n - 1), rel=1e-9)
    assert row.p_no_difference > row.p_tost  # looks have a price


def test_a_decided_arm_with_enough_seeds_is_not_extended_and_one_with_few_is():
    ledger = MemoryLedger()
    run(study(confirm={"seeds": 6, "reserve": 0.2, "margin": 1e-6}), ledger)
    found = run(study(confirm={"seeds": 9, "reserve": 0.2, "margin": 1e-6}), ledger)
    assert sum(key.startswith("confirm/") for key in found.records) == 4 * 9
    found = run(study(confirm={"seeds": 12, "reserve": 0.2, "margin": 1e-6}), ledger)
    seeds = {arm: sum(key.startswith(f"confirm/{arm}/") for key in found.records) for arm in GAIN}
    assert seeds == {"gelu": 12, "linear-floor": 9, "one": 9, "two": 12}
    assert not decided(found, found.study).unfinished


def test_an_old_ledger_keeps_every_cell_of_a_sequential_study():
    rule = {"seeds": None, "rule": "e-process", "margin": 1e-6}
    whole = run(study(confirm={**rule, "racing": False}))
    old = [event for event in whole.ledger.events if event["event"] != "look"]
    last = max(i for i, event in enumerate(old) if event["event"] == "ended" and event["cell"].endswith("/112"))
    ledger = MemoryLedger()
    ledger.events = old[: last + 1]
    before = {event["cell"] for event in ledger.events if event["event"] == "ended"}
    found = run(study(confirm=rule), ledger)
    seeds = {arm: sum(key.startswith(f"confirm/{arm}/") for key in found.records) for arm in GAIN}
    assert seeds == {"gelu": 20, "linear-floor": 12, "one": 12, "two": 20}
    rows = decided(found, found.study).comparisons
    assert {row.arm: row.n for row in rows} == {"linear-floor": 12, "one": 12, "two": 20}
    assert before <= set(found.records)


def test_a_contrast_is_one_more_comparison_of_the_family():
    found = run(study(contrasts=[["two", "one"]], confirm={"margin": 1e-6}))
    result = decided(found, found.study)
    (row,) = result.contrasts
    assert (row.arm, row.baseline, row.kind) == ("one", "two", "better")
    p = {
        **{arm: p_of(differences(found, arm, 6)) for arm in ("linear-floor", "one", "two")},
        "contrast": p_of(differences(found, "one", 6, reference="two")),
    }
    running, by_hand = 0.0, {}
    for rank, name in enumerate(sorted(p, key=p.get)):  # Holm over four comparisons
        running = max(running, min(1.0, (4 - rank) * p[name]))
        by_hand[name] = running
    assert row.p_adjusted == pytest.approx(by_hand["contrast"], rel=1e-9)
    assert {r.arm: r.p_adjusted for r in result.comparisons} == pytest.approx(
        {arm: q for arm, q in by_hand.items() if arm != "contrast"}, rel=1e-9
    )
    losses = {arm: [e["final"]["test_nll"] for e in found.ledger.events if of(e, arm)] for arm in ("one", "two")}
    assert row.improvement_percent == pytest.approx(100 * (1 - np.mean(losses["one"]) / np.mean(losses["two"])))
    assert "one against two: better" in result.summary
    assert "one against two" in verdict_markdown(result)
    assert as_object(result)["contrasts"][0]["p_t"] == pytest.approx(p["contrast"], rel=1e-9)
    assert "contrasts" not in as_object(decided(run(study()), study()))


def test_a_contrast_keeps_both_of_its_arms_until_it_is_decided():
    rule = {"seeds": None, "rule": "e-process", "margin": 1e-6}

    def equal(cell, share):
        return loss(cell, share) - (0.03 if cell.arm == "two" else 0.0)

    alone = run(study(confirm=rule), test=equal)
    both = run(study(confirm=rule, contrasts=[["one", "two"]]), test=equal)
    seeds = [{arm: sum(of(e, arm) for e in each.ledger.events) for arm in GAIN} for each in (alone, both)]
    assert max(seeds[0].values()) < 20
    assert [seeds[1][arm] for arm in ("gelu", "one", "two")] == [20, 20, 20]
    assert seeds[1]["linear-floor"] < 20
    result = decided(both, both.study)
    assert {row.label: row.kind for row in result.every} == {
        "linear-floor": "worse",
        "one": "better",
        "two": "better",
        "two against one": "undecided",
    }
    assert to_change(result, both.study)[-1].startswith(("To decide two against one: ", "two against one: needs more"))


def diverging(arm, *seeds):
    """Return the losses of the study in which an arm diverges on these confirm seeds."""

    def test(cell, share):
        lost = cell.stage == "confirm" and cell.arm == arm and cell.seed in seeds
        return math.inf if lost else loss(cell, share)

    return test


def test_a_diverged_run_ends_the_e_process_of_its_arm_and_the_advice_adds_no_seeds():
    plan = study(confirm={"seeds": None, "rule": "e-process", "first_seed": 101})
    found = run(plan, test=diverging("one", 104))
    result = decided(found, plan)
    rows = {row.arm: row for row in result.comparisons}
    assert (rows["one"].n, rows["one"].verdict) == (4, "undecided (a diverged run ended its evidence)")
    assert rows["one"].seeds_needed is None
    assert "the e-process needs complete pairs" in rows["one"].why
    assert "intention to treat decides" not in rows["one"].why  # its worst-rank p decides nothing
    assert to_change(result, plan)[-1] == (
        "one: a diverged run ended the evidence, so added seeds cannot decide. obrien-fleming counts such a run as the "
        "worst: confirm.rule: e-process -> obrien-fleming and confirm.first_seed: 101 -> 121, under another name"
    )
    later = {row.arm: row for row in decided(run(plan, test=diverging("linear-floor", 120)), plan).comparisons}
    assert later["linear-floor"].kind == "worse"  # decided before that seed


def test_a_floor_whose_evidence_a_diverged_run_ended_is_not_one_that_does_not_lose():
    plan = study(confirm={"seeds": None, "rule": "e-process"})
    found = run(plan, test=diverging("linear-floor", 101))
    result = decided(found, plan)
    said = would_change(Findings(table(found)))
    assert said[0].startswith("Another rule: linear-floor is undecided and a diverged run ended its evidence")
    assert not any("Longer trials" in line or "diverged runs decide" in line for line in said)
    assert (result.sensitivity.evidence_ended, result.sensitivity.too_few_seeds) == (True, False)
    assert {row.refusal for row in result.in_question} == {"evidence_ended"}
    said = "a diverged run ended the evidence that the floor loses to gelu"
    assert result.in_question[0].verdict == f"not testable: {said}"
    assert result.summary.startswith(f"Not testable: {said}: linear-floor is undecided and a diverged run ")
    assert result.comparisons[0].n == 3
    (advice,) = to_change(result, plan)
    assert advice.startswith("linear-floor: a diverged run ended the evidence")
    assert "regime" not in result.summary
    counted = study(confirm={"seeds": None, "rule": "obrien-fleming"})
    kept = decided(run(counted, test=diverging("linear-floor", 101)), counted)
    assert kept.sensitivity.testable  # the advice helps


def test_a_floor_that_diverges_on_too_few_seeds_needs_more_of_them():
    every = range(101, 121)
    few, more = (
        decided(run(study(confirm={"seeds": n}), test=diverging("linear-floor", *every)), study(confirm={"seeds": n}))
        for n in (6, 8)
    )
    assert few.comparisons[0].p_adjusted == pytest.approx(2 * 2 / 2**6)  # Holm, after `one`
    assert {row.refusal for row in few.in_question} == {"too_few_seeds"}
    said = "All 6 runs of linear-floor are infeasible: the loss is inf at step 1. Not testable: too few seeds to tell "
    assert few.summary.startswith(f"{said}the floor from gelu: ")
    assert to_change(few, study())[0].startswith("To tell the floor from gelu: confirm.first_seed: 101 -> 107 and ")
    assert more.sensitivity.testable
    assert more.comparisons[0].kind == "worse"


def test_an_arm_whose_machine_failed_whole_leaves_the_verdicts_of_the_others():
    def broken(cell, share):
        if cell.stage == "confirm" and cell.arm == "two":
            raise OSError("the disk is gone")
        return loss(cell, share)

    plan = study(confirm={"seeds": 6})
    found = run(plan, test=broken)
    rows = {row.arm: row for row in decided(found, plan).comparisons}
    assert rows["two"].verdict == "not testable (no treatment runs)"
    assert (rows["linear-floor"].verdict, rows["one"].n) == ("worse", 6)


@pytest.mark.parametrize("rule", ["e-process", "obrien-fleming"])
def test_an_arm_that_is_identical_stops_at_its_first_look(rule):
    plan = study(confirm={"seeds": None, "rule": rule})

    def same(cell, share):
        return loss(replace(cell, arm="gelu") if cell.arm == "two" else cell, share)

    rows = {row.arm: row for row in decided(run(plan, test=same), plan).comparisons}
    assert (rows["two"].kind, rows["two"].n) == ("identical", 3)
    assert rows["one"].n == 8
