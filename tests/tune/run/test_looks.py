"""Looks of a study: which are recorded, and what each costs."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import typer

from analysis.io.study import load
from analysis.report.methods import methods
from analysis.verdict.decide import decide
from tests.tune.run.known_losses import GAIN, decided, differences, loss, p_of, run, study, table
from tune.backend.inline import Inline
from tune.cli.analyses import forwarded
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


@dataclass
class Arguments:
    """The context of a command, with its arguments."""

    args: list[str]


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
    with pytest.raises(typer.Exit):
        forwarded("growth", "analysis.describe.growth", "")(Arguments([f"--study={folder}"]))
    assert len(verdicts()) == 1  # no verdict
    with pytest.raises(typer.Exit):
        forwarded("improvement", "analysis.describe.improvement", "")(Arguments([f"--study={folder}"]))
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
    held = next(row for row in result.comparisons if row.arm == "one")
    assert methods(table(first))[-1].endswith("All of it was named before the study ran.")
    more = run(study(confirm={**plain, "seeds": 9}), ledger)
    result = decided(more, more.study)
    assert result.summary.startswith(
        "The level of 5% no longer holds: seeds were added after a verdict, without a reserve. With looks at 6 and 9 "
        "seeds, up to 10% of studies without a difference say better or worse. With 9 seeds"
    )
    assert methods(table(more))[-1].endswith("It was named before the study ran, except the seeds after the first 6.")
    row = {row.arm: row for row in result.comparisons}["two"]
    assert row.p_t == pytest.approx(p_of(differences(more, "two", 9)), rel=1e-9)
    assert row.p_deciding == row.p_t  # the numbers are those of all seeds
    better = next(row for row in result.comparisons if row.arm == "one")
    assert better.kind == "better"
    assert (better.selected_level, better.selected_low) == (None, None)  # no interval holds for all arms together
    assert "holds for all arms" not in better.why
    assert "p of this look alone = " in better.why
    assert "holds for all arms" in held.why
    assert to_change(result, more.study)[-1].startswith("two: undecided, and this study has spent its level")


def test_contrasts_are_named_before_the_first_confirm_trial_has_ended(tmp_path):
    one, more = study(), study(contrasts=[["one", "two"]])
    begun = StudyRun(one, tmp_path, Known(one, loss))
    (tmp_path / "study.yaml").write_text(dump(one))
    while (cell := begun.next_cell()).stage == "search":
        begun.start(cell)
        begun.end(cell, "completed", {"val_nll": loss(cell, 1.0), "steps": 10})
    check_folder(more, tmp_path)
    begun.start(cell)
    begun.end(cell, "completed", {"val_nll": 3.0, "test_nll": 3.0, "steps": 10})  # the first look is far
    begun.close()
    with pytest.raises(StudyError, match=r"contrasts was \[\] and is now .*before the first confirm trial has ended"):
        check_folder(more, tmp_path)


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


def test_the_bare_table_of_a_study_with_looks_says_first_that_its_p_is_of_one_look(tmp_path):
    def bare(found):
        tables("s", found.ledger.events)[0].to_parquet(tmp_path / "t.parquet")
        return decide(load(tmp_path / "t.parquet", baseline="gelu", floor="linear-floor"))

    ledger = MemoryLedger()
    once = bare(run(study(confirm={"seeds": 8, "margin": 1e-6}), ledger))
    assert once.summary.startswith("With 8 seeds")
    again = bare(run(study(confirm={"seeds": 20, "margin": 1e-6}), ledger))
    said = "p is that of one look, and the level of 5% does not hold; give the study's folder. "
    assert again.summary.startswith(f"These are trials of a study with looks at 8 and 20 seeds: {said}With 8 seeds")
    assert {row.selected_low for row in again.comparisons} == {None}
    rule = bare(run(study(confirm={"rule": "obrien-fleming", "seeds": None, "margin": 1e-6})))
    assert rule.summary.startswith(f"These are trials of a study with looks at 3, 5, 8 and 10 seeds: {said}")
    rows = tables("s", ledger.events)[0].assign(added=lambda rows: rows["arm"] == "one").drop(columns="look")
    rows.to_csv(tmp_path / "t.csv", index=False)
    late = decide(load(tmp_path / "t.csv", baseline="gelu", floor="linear-floor")).summary
    assert late.startswith("These are trials of a study with arms that joined late (one): p is that of one look")
