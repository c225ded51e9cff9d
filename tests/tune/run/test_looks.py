"""Looks of a study: which are recorded, what each costs, and which arms go on after one."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from analysis.io.assemble import assemble
from analysis.report.build import verdict_markdown
from analysis.report.methods import methods
from analysis.report.takeaways import loss_curves
from analysis.verdict.decide import decide
from analysis.verdict.kinds import as_object
from tests.studies import TINY, changed, study_of
from tune.backend.inline import Inline
from tune.cli.next_steps import to_change
from tune.errors import StudyError
from tune.run.extend import check_folder
from tune.run.ledger import Ledger, MemoryLedger, read
from tune.run.standing import standing
from tune.run.study_run import StudyRun
from tune.run.tables import tables, write_tables
from tune.run.verdicts import shown
from tune.study.files import dump
from tune.subject.known import Known

STUDY = changed(
    TINY,
    fixed={"tokens": 640},
    keep={"models": "none"},
    arms={"one": {"gate": "tanh", "alpha": 0.5}, "two": {"gate": "relu", "alpha": 0.5}},
    search={"pruner": "none"},
    stages=["search", "confirm"],
    confirm={"seeds": 6},
)
GAIN = {"gelu": 0.0, "linear-floor": -0.5, "one": 0.03, "two": 0.0}  # nats below the baseline


def study(**changes):
    return study_of(STUDY, name="s", **changes)


def loss(cell, share):
    """Return a loss with noise that a cell always has; `one` is better, and `two` is equal to the baseline."""
    own = np.random.default_rng([cell.seed, *map(ord, cell.arm)]).normal()
    return 3.0 + 0.1 * math.sin(cell.seed) + 0.01 * own - GAIN[cell.arm]


def run(study, ledger=None, test=loss):
    """Run a study on a ledger, of which earlier studies may have written a part. Return the run."""
    run = StudyRun(study, None, Known(study, test), ledger=ledger or MemoryLedger())
    Inline().train(run)
    assert run.stages.finished
    assert run.stages.remaining() == 0
    assert run.progress.finished
    return run


def table(run):
    rows, _ = tables("s", run.ledger.events)
    return assemble("s", "s", rows, pd.DataFrame(), run.study.model_dump())


def decided(run, study):
    assert run.study == study
    return decide(table(run))


def differences(run, arm, n, reference="gelu"):
    """Return the differences of the first n seeds, from the ledger's own lines."""
    found = {}
    for event in run.ledger.events:
        if event["event"] == "ended" and event["cell"].startswith("confirm/"):
            _, name, _, seed = event["cell"].split("/")
            found[name, int(seed)] = event["final"]["test_nll"]
    return np.array([found[reference, 101 + i] - found[arm, 101 + i] for i in range(n)])


def p_of(d):
    return stats.ttest_1samp(d, 0.0).pvalue


def test_an_extension_with_a_reserve_tests_each_look_at_its_share():
    ledger = MemoryLedger()
    kept = {"reserve": 0.2, "margin": 1e-6, "correction": "none"}
    first = run(study(confirm={"seeds": 6, **kept}), ledger)
    row = {row.arm: row for row in decided(first, first.study).comparisons}["two"]
    assert row.p_deciding == pytest.approx(min(1.0, p_of(differences(first, "two", 6)) / 0.8), rel=1e-9)
    more = run(study(confirm={"seeds": 14, **kept}), ledger)
    more = run(study(confirm={"seeds": 20, **kept}), ledger)
    row = {row.arm: row for row in decided(more, more.study).comparisons}["two"]
    by_hand = [p_of(differences(more, "two", n)) / share for n, share in ((6, 0.8), (14, 0.1), (20, 0.05))]
    assert [look["n"] for look in row.path] == [6, 14, 20]
    assert row.p_deciding == row.p_anytime == pytest.approx(min(1.0, *by_hand), rel=1e-9)
    assert [look["stops_at"] for look in row.path] == pytest.approx([0.04, 0.005, 0.0025])


def looks(events):
    return [(max(e["seeds"].values()), max(e["next"].values(), default=0)) for e in events if e["event"] == "look"]


def test_every_look_is_in_the_ledger_whether_or_not_a_report_was_made():
    ledger = MemoryLedger()
    run(study(), ledger)
    run(study(), ledger)  # a replay adds nothing
    assert looks(ledger.events) == [(0, 6), (6, 0)]
    run(study(confirm={"seeds": 9}), ledger)
    assert looks(ledger.events) == [(0, 6), (6, 0), (6, 9), (9, 0)]
    rows, _ = tables("s", ledger.events)
    rows = rows[rows["stage"] == "confirm"]
    assert rows.groupby("look")["seed"].agg(["min", "max"]).to_dict("index") == {
        6: {"min": 101, "max": 106},
        9: {"min": 107, "max": 109},
    }
    assert "look" not in tables("s", run(study(confirm={"seeds": 9})).ledger.events)[0]  # planned at once: one look


def test_a_number_of_seeds_that_changed_before_any_result_is_no_look():
    ledger = MemoryLedger()
    begun = StudyRun(study(), None, Known(study(), loss), ledger=ledger)
    cell = begun.next_cell()
    while cell.stage == "search":
        begun.start(cell)
        begun.end(cell, "completed", {"val_nll": loss(cell, 1.0), "steps": 10})
        cell = begun.next_cell()
    assert looks(ledger.events) == [(0, 6)]
    run(study(confirm={"seeds": 9}), ledger)
    assert looks(ledger.events) == [(0, 6), (0, 9), (9, 0)]
    assert "look" not in tables("s", ledger.events)[0]


def test_a_number_that_changed_after_a_result_counts_even_if_no_report_was_possible():
    ledger = MemoryLedger()
    begun = StudyRun(study(), None, Known(study(), loss), ledger=ledger)
    ended = 0
    while ended < 5:  # of 24 confirm trials
        cell = begun.next_cell()
        begun.start(cell)
        begun.end(cell, "completed", {"val_nll": loss(cell, 1.0), "test_nll": loss(cell, 1.0), "steps": 10})
        ended += cell.stage == "confirm"
    run(study(confirm={"seeds": 9}), ledger)
    assert looks(ledger.events) == [(0, 6), (6, 9), (9, 0)]


def test_a_ledger_from_before_looks_were_recorded_has_the_look_of_its_study_file(tmp_path):
    old = run(study())
    events = [event for event in old.ledger.events if event["event"] != "look"]
    path = Ledger(tmp_path / "ledger.jsonl")
    for event in events:
        path.append(**event)
    path.close()
    (tmp_path / "study.yaml").write_text(dump(study()))
    more = study(confirm={"seeds": 9})
    check_folder(more, tmp_path)
    again = StudyRun(more, tmp_path, Known(more, loss))
    (tmp_path / "study.yaml").write_text(dump(more))
    Inline().train(again)
    again.close()
    assert looks(read(tmp_path / "ledger.jsonl")) == [(0, 6), (6, 9), (9, 0)]
    repeated = StudyRun(more, tmp_path, Known(more, loss))
    assert repeated.stages.finished
    repeated.close()
    assert looks(read(tmp_path / "ledger.jsonl")) == [(0, 6), (6, 9), (9, 0)]


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


def test_a_verdict_that_was_shown_is_one_event_for_each_state_of_the_data(tmp_path):
    one, folder = study(confirm={"reserve": 0.2}), tmp_path / "s"
    folder.mkdir()

    def trained(plan):
        found = StudyRun(plan, folder, Known(plan, loss))
        (folder / "study.yaml").write_text(dump(plan))
        Inline().train(found)
        found.close()
        write_tables("s", found.ledger.events, folder)

    def verdicts():
        return [event for event in read(folder / "ledger.jsonl") if event["event"] == "verdict"]

    trained(one)
    significance = [sys.executable, "-m", "tune.cli", "significance", str(folder), "--format", "json"]
    done = subprocess.run(significance, capture_output=True, text=True, check=True)  # a fresh process
    said = json.loads(done.stdout)
    (event,) = verdicts()
    assert event["seeds"] == dict.fromkeys(GAIN, 6)
    assert event["losses"] == said["losses_sha256"]
    assert event["verdicts"] == {row["arm"]: row["kind"] for row in said["comparisons"]}
    assert not shown(folder)
    assert StudyRun(one, folder, Known(one, loss)).close() is None  # the event is read over
    assert len(verdicts()) == 1
    more = study(confirm={"seeds": 8, "reserve": 0.2})
    trained(more)
    assert standing(folder).state == "finished"
    assert shown(folder)
    assert [event["seeds"]["gelu"] for event in verdicts()] == [6, 8]
    held = Ledger(folder / "ledger.jsonl")
    held.append("ended", cell="x", outcome="completed", final={})
    assert not shown(folder)  # a sweep has the ledger
    held.close()


def test_an_extension_without_a_reserve_says_first_that_the_level_no_longer_holds():
    ledger = MemoryLedger()
    plain = {"margin": 1e-6}
    first = run(study(confirm=plain), ledger)
    result = decided(first, first.study)
    assert "level" not in result.summary
    assert methods(table(first))[-1].endswith("All of it was named before the study ran.")
    more = run(study(confirm={**plain, "seeds": 9}), ledger)
    result = decided(more, more.study)
    assert result.summary.startswith(
        "The level of 5% no longer holds: seeds were added after a verdict, without a reserve. With looks at 6 and 9 "
        "seeds, about 10% of studies without a difference would say better or worse. With 9 seeds"
    )
    assert methods(table(more))[-1].endswith("It was named before the study ran, except the seeds after the first 6.")
    row = {row.arm: row for row in result.comparisons}["two"]
    assert row.p_t == pytest.approx(p_of(differences(more, "two", 9)), rel=1e-9)
    assert row.p_deciding == row.p_t  # the numbers are those of all seeds
    assert to_change(result, more.study)[-1].startswith("two: undecided, and this study has spent its level")


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


def of(event, arm):
    return event["event"] == "ended" and event["cell"].startswith(f"confirm/{arm}/")


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


def test_the_reserve_is_named_before_the_first_confirm_trial_has_ended(tmp_path):
    one = study(confirm={"reserve": 0.2})
    begun = StudyRun(one, tmp_path, Known(one, loss))
    (tmp_path / "study.yaml").write_text(dump(one))
    check_folder(study(confirm={"reserve": 0.1}), tmp_path)
    Inline().train(begun)
    begun.close()
    check_folder(study(confirm={"reserve": 0.2, "racing": False}), tmp_path)
    with pytest.raises(StudyError, match=r"confirm.reserve was 0.2 and is now 0.1; it is named before the first"):
        check_folder(study(confirm={"reserve": 0.1}), tmp_path)
    with pytest.raises(StudyError, match=r"reserve=0.2 is for the fixed rule"):
        study(confirm={"reserve": 0.2, "rule": "e-process", "seeds": None})
