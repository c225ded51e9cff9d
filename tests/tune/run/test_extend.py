"""Changes of a study that has begun: added arms, and refusals in the words of the study file."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from analysis.io.study import load
from analysis.verdict.decide import decide
from tests.studies import TINY, changed, study_of, yaml_of
from tests.tune.helpers import Caught
from tune.backend.inline import Inline
from tune.errors import StudyError
from tune.run import ledger
from tune.run.extend import check_folder, groups
from tune.run.study_run import StudyRun
from tune.run.tables import write_tables
from tune.study.files import dump
from tune.study.inputs import Inputs
from tune.subject.known import Known

STUDY = changed(
    TINY,
    fixed={"tokens": 640},
    keep={"models": "none"},
    arms={"mine": {"gate": "tanh", "alpha": 0.5}},
    search={"pruner": "none", "trials_per_arm": 3},
    calibrate={"points": 3, "seeds": 2, "max_points": 9},
    confirm={"seeds": 6},
)
NEW = {"new": {"gate": "relu", "alpha": 0.5}}
OPTIMA = {"gelu": 3e-3, "linear-floor": 3e-3, "mine": 3e-3, "new": 2e-2, "later": 3e-3, "searched": 3e-3}


def study(**changes):
    return study_of(STUDY, name="s", **changes)


def loss(cell, share):
    """Return a bowl over the learning rate; on the confirm seeds the floor loses and the other arms win a little."""
    value = 3.0 + abs(np.log(cell.config["lr"] / OPTIMA[cell.arm])) ** 2 / 10 - share / 100
    gain = {"gelu": 0.0, "linear-floor": -0.5}.get(cell.arm, 0.1)
    return value + 0.01 * np.sin(cell.seed) - gain + 0.001 * np.cos(3 * cell.seed + ord(cell.arm[0]))


def run(study, folder, stop_after=None, check=True):
    """Run a study in a folder, as `sweep` does. Return the keys of the cells that were trained now."""
    folder.mkdir(exist_ok=True)
    if check:
        check_folder(study, folder)
    path = folder / "ledger.jsonl"
    before = set(finals(folder)) if path.exists() else set()
    caught = Caught(stop_after or np.inf)
    run = StudyRun(study, folder, Known(study, loss), interruption=caught, listen=caught.ended)
    (folder / "study.yaml").write_text(dump(study))
    Inline().train(run)
    run.close()
    assert run.stages.finished == (stop_after is None)
    assert not (run.stages.finished and run.stages.remaining())
    write_tables("s", run.ledger.events, folder)
    return [key for key in finals(folder) if key not in before]


def finals(folder):
    """Return the final losses of the cells that have ended, by key."""
    found = ledger.records(ledger.read(folder / "ledger.jsonl"))
    return {key: record.final for key, record in found.items() if record.outcome}


def events(folder, *kinds):
    return [event for event in ledger.read(folder / "ledger.jsonl") if event["event"] in kinds]


def test_an_added_arm_is_trained_on_the_same_points_and_seeds_and_the_others_stay(tmp_path):
    run(study(), tmp_path)
    before, grid = finals(tmp_path), events(tmp_path, "grid")[-1]["grid"]
    chosen = {event["arm"]: event["config"] for event in events(tmp_path, "chosen")}
    trained = run(study(arms={**STUDY["arms"], **NEW}), tmp_path)
    after = finals(tmp_path)
    assert {key: after[key] for key in before} == before
    ended = ledger.records(ledger.read(tmp_path / "ledger.jsonl"))
    cells = [ended[key].cell for key in trained]
    assert sum(cell.stage == "search" for cell in cells) == 3
    longer = events(tmp_path, "grid")[-1]["grid"]
    assert len(longer) > len(grid)  # the best rate of the new arm lies beyond the grid, which grows for all arms
    assert set(grid) < set(longer)
    for arm in OPTIMA:
        mine = [record.cell for record in ended.values() if record.cell.arm == arm]
        points = {(cell.config["lr"], cell.seed) for cell in mine if cell.stage == "calibrate"}
        there = arm not in ("later", "searched")
        assert points == ({(rate, seed) for rate in longer for seed in (11, 12)} if there else set())
        if there:
            assert {cell.seed for cell in mine if cell.stage == "confirm"} == set(range(101, 107))
    again = {event["arm"]: event["config"] for event in events(tmp_path, "chosen")}
    assert {arm: again[arm] for arm in chosen} == chosen
    assert again["new"]["lr"] == pytest.approx(OPTIMA["new"], rel=0.2)
    assert sorted({cell.arm for cell in cells if cell.stage == "confirm"}) == ["new"]
    assert run(study(arms={**STUDY["arms"], **NEW}), tmp_path) == []


def test_arms_that_do_not_search_are_added_after_the_others_and_not_before(tmp_path):
    own = {"trials_per_arm": 2, "arms": "own"}
    searched = {"searched": {"gate": "sigmoid", "alpha": {"search": {"uniform": [0.0, 1.0]}}}}
    arms = {**STUDY["arms"], "new": {"gate": "relu", "alpha": 0.5}}
    run(study(search=own), tmp_path, stop_after=3)
    assert groups(events(tmp_path, "grid")) == [["gelu", "linear-floor", "mine"]]
    run(study(search=own), tmp_path)
    assert not load(tmp_path).added
    assert {key.split("/")[0] for key in finals(tmp_path)} == {"calibrate", "confirm"}
    trained = run(study(search=own, arms=arms), tmp_path)
    assert load(tmp_path).added == ["new"]
    assert {key.split("/")[0] for key in trained} <= {"calibrate", "confirm"}
    assert groups(events(tmp_path, "grid", "suggested", "chosen"))[1:] == [["new"]]
    more = tmp_path / "more"
    run(study(search=own, arms={**arms, **searched}), more)
    assert groups(events(more, "grid", "suggested", "chosen")) == [["searched", *arms]]
    assert not load(more).added


def test_the_verdict_counts_the_added_arm_and_says_so(tmp_path):
    run(study(), tmp_path)
    alone = {row.arm: row for row in decide(load(tmp_path)).comparisons}
    assert "added" not in decide(load(tmp_path)).summary
    run(study(arms={**STUDY["arms"], **NEW}), tmp_path)
    result = decide(load(tmp_path))
    rows = {row.arm: row for row in result.comparisons}
    said = (
        "added after the configurations of the other arms had been chosen: new; p is corrected for all 3 arms, and the "
        "level of 0.05 holds only if no result led to the addition"
    )
    assert result.summary.endswith(f"A{said[1:]}.")
    assert said in rows["new"].why
    assert said not in rows["mine"].why
    assert rows["mine"].p_t == alone["mine"].p_t
    smallest = min(alone.values(), key=lambda row: row.p_t)
    assert rows[smallest.arm].level_of_first_step < smallest.level_of_first_step
    assert not result.unfinished


def test_an_arm_that_is_added_before_anything_was_decided_is_one_of_the_first(tmp_path):
    run(study(), tmp_path / "a", stop_after=4)
    run(study(arms={**STUDY["arms"], **NEW}), tmp_path / "a")
    run(study(arms={**STUDY["arms"], **NEW}), tmp_path / "b")
    assert finals(tmp_path / "a") == finals(tmp_path / "b")
    assert "added" not in decide(load(tmp_path / "a")).summary


@pytest.mark.parametrize("stop", [5, 20])
def test_an_addition_that_is_interrupted_continues_to_the_same_cells(tmp_path, stop):
    more = {**STUDY["arms"], **NEW}
    for name in "ab":
        run(study(), tmp_path / name)
    run(study(arms=more), tmp_path / "a")
    run(study(arms=more), tmp_path / "b", stop_after=stop)
    run(study(arms=more), tmp_path / "b")
    assert finals(tmp_path / "a") == finals(tmp_path / "b")
    third = {**more, "later": {"gate": "gelu", "alpha": 0.5}}
    trained = run(study(arms=third), tmp_path / "a")
    assert {key.split("/")[1] for key in trained} == {"later"}
    assert groups(ledger.read(tmp_path / "a" / "ledger.jsonl"))[1:] == [["new"], ["later"]]


def test_more_seeds_and_an_arm_may_come_together(tmp_path):
    run(study(), tmp_path)
    trained = run(study(arms={**STUDY["arms"], **NEW}, confirm={"seeds": 8}), tmp_path)
    confirmed = sorted(key.split("/")[1] + key[-4:] for key in trained if key.startswith("confirm/"))
    old = [f"{arm}/{seed}" for arm in ("gelu", "linear-floor", "mine") for seed in (107, 108)]
    assert confirmed == sorted(old + [f"new/{seed}" for seed in range(101, 109)])


@pytest.mark.parametrize("stages", [["search"], ["search", "calibrate"], ["search", "confirm"]])
def test_an_arm_can_be_added_to_a_study_without_all_stages(tmp_path, stages):
    run(study(stages=stages), tmp_path)
    trained = run(study(stages=stages, arms={**STUDY["arms"], **NEW}), tmp_path)
    assert {key.split("/")[0] for key in trained if "/new/" in key} == set(stages)
    assert run(study(stages=stages, arms={**STUDY["arms"], **NEW}), tmp_path) == []


def test_an_e_process_takes_an_arm_and_goes_on_until_all_are_decided(tmp_path):
    rule = {"seeds": 10, "rule": "e-process", "max_seeds": 12}
    run(study(confirm=rule), tmp_path)
    before = {key.rpartition("/")[2] for key in finals(tmp_path) if key.startswith("confirm/")}
    run(study(confirm=rule, arms={**STUDY["arms"], **NEW}), tmp_path)
    seeds = {
        arm: {key.rpartition("/")[2] for key in finals(tmp_path) if key.startswith(f"confirm/{arm}/")}
        for arm in ("gelu", "linear-floor", "mine", "new")
    }
    assert before <= seeds["gelu"]
    assert len(set(map(frozenset, seeds.values()))) == 1  # all arms have the same seeds
    assert not decide(load(tmp_path)).unfinished


def test_obrien_fleming_takes_an_arm_only_before_the_rates_are_chosen(tmp_path):
    rule = {"seeds": 10, "rule": "obrien-fleming"}
    more = study(confirm=rule, arms={**STUDY["arms"], **NEW})
    run(study(confirm=rule), tmp_path, stop_after=3)
    check_folder(more, tmp_path)
    run(study(confirm=rule), tmp_path)
    assert refused(more, tmp_path) == (
        "arms.new is new, and the bounds of obrien-fleming hold only for the arms that were set before the learning "
        "rates were chosen: leave it out, or give the study another name"
    )


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(changed, folder):
    """Return the message that refuses a changed study, without the folder."""
    with pytest.raises(StudyError) as caught:
        check_folder(changed, folder)
    said = str(caught.value)
    assert said.startswith(f"{folder}: ")
    assert not {"{'", "None", "True", "False"} & {said[i : i + n] for i in range(len(said)) for n in (2, 4, 5)}
    return said.removeprefix(f"{folder}: ")


EARLIER = "the study has trials of the earlier configuration: undo the change, or give the study another name"
KEEP = (
    "the study has trials of the earlier configuration: keep the arm as it was and add the changed one as a new arm, "
    "or give the study another name"
)
GELU, FLOOR, MINE = STUDY["arms"]["gelu"], STUDY["arms"]["linear-floor"], STUDY["arms"]["mine"]
REFUSED = {
    "an alpha": ({"arms": {"mine": {**MINE, "alpha": 0.7}}}, f"arms.mine.alpha was 0.5 and is now 0.7; {KEEP}"),
    "a searched alpha": (
        {"arms": {"mine": {**MINE, "alpha": {"search": {"uniform": [0.0, 2.0]}}}}},
        f"arms.mine.alpha was 0.5 and is now {{search: {{uniform: [0.0, 2.0], per: model}}}}; {KEEP}",
    ),
    "a unit": (
        {"arms": {"mine": {"unit": "relu2"}}},
        "arms.mine.gate was tanh and is now not set, arms.mine.alpha was 0.5 and is now not set, arms.mine.unit was "
        f"not set and is now relu2; {KEEP}",
    ),
    "a removed arm": (
        {"arms": {"mine": None}},
        "arms.mine is no longer in the study file; an arm cannot be removed: put it back, or give the study another "
        "name",
    ),
    "a renamed arm": (
        {"arms": {"mine": None, "my-gate": MINE}},
        "arms.mine is no longer in the study file (if it is now called my-gate: an arm cannot be renamed); an arm "
        "cannot be removed: put it back, or give the study another name",
    ),
    "a baseline": (
        {"arms": {"gelu": {}, "mine": {**MINE, "baseline": True}}},
        "the baseline was gelu and is now mine; it cannot change: mark the first one again, or "
        "give the study another name",
    ),
    "a floor": (
        {"arms": {"linear-floor": {**FLOOR, "floor": False}}},
        f"arms.linear-floor.floor was true and is now false; {KEEP}",
    ),
    "fewer seeds": (
        {"confirm": {"seeds": 4}},
        "confirm.seeds was 6 and is now 4; it can only grow: undo the change, or give the study another name",
    ),
    "a rule": (
        {"confirm": {"rule": "e-process", "seeds": None}},
        f"confirm.rule was fixed and is now e-process; {EARLIER}",
    ),
    "a replicate": ({"replicate": 1}, f"replicate was 0 and is now 1; {EARLIER}"),
    "a level": ({"confirm": {"level": 0.01}}, f"confirm.level was 0.05 and is now 0.01; {EARLIER}"),
    "tokens": ({"fixed": {"tokens": 1280}}, f"fixed.tokens was 640 and is now 1280; {EARLIER}"),
    "rows": ({"corpus": {"rows": "lines"}}, f"corpus.rows was packed and is now lines; {EARLIER}"),
    "a range": (
        {"nuisance": {"lr": {"loguniform": [1e-3, 2e-2]}}},
        f"nuisance.lr.loguniform was [0.001, 0.01] and is now [0.001, 0.02]; {EARLIER}",
    ),
    "a stage less": (
        {"stages": ["search", "calibrate"]},
        f"stages was [search, calibrate, confirm] and is now [search, calibrate]; {EARLIER}",
    ),
    "much": (
        {"fixed": {"tokens": 1280, "beta1": 0.8, "beta2": 0.9}, "model": {"d_model": 16}},
        f"model.d_model was 8 and is now 16, fixed.tokens was 640 and is now 1280, fixed.beta1 was 0.9 and is now 0.8, "
        f"and 1 more; {EARLIER}",
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a finished study."""
    folder = tmp_path_factory.mktemp("finished") / "s"
    run(study(), folder)
    return folder


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_a_change_is_refused_with_key_and_values_as_the_study_file_has_them(changes, said, finished):
    before = (finished / "study.yaml").read_text()
    assert refused(study(**changes), finished) == said
    assert (finished / "study.yaml").read_text() == before
    assert yaml.safe_load(yaml_of(STUDY)) == STUDY


def test_a_changed_arm_beside_a_new_one_is_refused_too(finished):
    arms = {**STUDY["arms"], **NEW, "mine": {**MINE, "alpha": 0.7}}
    assert refused(study(arms=arms), finished) == f"arms.mine.alpha was 0.5 and is now 0.7; {KEEP}"


def test_the_order_of_arms_and_keys_changes_nothing(finished):
    turned = json.loads(json.dumps({**STUDY, "arms": dict(reversed(STUDY["arms"].items()))}))
    check_folder(study_of(turned, name="s"), finished)


# --- own gates -------------------------------------------------------------------------------------------------------


class Gated(Known):
    """Known losses of a study with own gates, whose digests are compared as those of real inputs are."""

    def __init__(self, study, gates):
        super().__init__(study, loss)
        self.inputs = Inputs(Path(), Path(), {"digest": "known"}, gates, None)

    def identity(self):
        return self.inputs.identity()

    def check_begun(self, begun):
        self.inputs.check_begun(begun)


def test_the_gate_of_an_added_arm_is_recorded_and_may_not_change(tmp_path):
    run(study(), tmp_path)
    more = study(arms={**STUDY["arms"], "new": {"gate": "g.py:hard", "alpha": 0.5}})

    def begin(digest):
        StudyRun(more, tmp_path, Gated(more, {"g.py:hard": digest})).close()

    begin("a" * 64)
    begin("a" * 64)
    assert [event["gates"] for event in events(tmp_path, "gates")] == [{"g.py:hard": "a" * 64}]
    with pytest.raises(StudyError, match="are not those that the study was begun with"):
        begin("b" * 64)
