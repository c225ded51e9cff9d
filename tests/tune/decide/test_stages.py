import itertools
import math
import random

import pytest

from analysis.io.names import SEEDS_APART
from tests.studies import SMALL, changed, study_of
from tune.decide.calibrate import geometric_grid, geometric_mean
from tune.decide.stages import Stages
from tune.errors import StudyError
from tune.plan.plan import idle_slots
from tune.study.sections import ConfirmSection
from tune.study.sizes import arm_trials
from tune.study.study import digest

STUDY = changed(
    SMALL,
    arms={"mine": None, "searched": {"gate": "sigmoid", "alpha": {"search": {"uniform": [0.0, 2.0]}}}},
    search={"trials_per_arm": 4},
    calibrate={"points": 3, "seeds": 2, "max_points": 7},
    confirm={"seeds": 3},
)
DECADE = {"lr": {"loguniform": [1e-3 / 10**0.5, 1e-3 * 10**0.5]}}
OPTIMA = {"gelu": 1e-3, "floor": 1e-3, "searched": 2e-3}


def drive(order_seed=0, optima=OPTIMA, slots=4, outcome=lambda cell: "completed", extra=lambda cell: 0.0, **changes):
    """Run the stages on losses that are a known parabola over the log learning rate. Cells end in a random order."""
    decisions = []
    stages = Stages(study_of(STUDY, **changes), lambda event, **fields: decisions.append((event, fields)), {})
    rng, running, cells = random.Random(order_seed), [], []
    while not stages.finished:
        while len(running) < slots and (cell := stages.next_cell()):
            running.append(cell)
            cells.append(cell)
        cell = running.pop(rng.randrange(len(running)))
        loss = 3.0 + math.log(cell.config["lr"] / optima[cell.arm]) ** 2 + 1e-4 * (cell.seed % 7) + extra(cell)
        stages.complete(cell, outcome(cell), loss if outcome(cell) == "completed" else math.inf, 10)
    return stages, cells, decisions


def test_every_arm_gets_the_same_number_of_cells_in_every_stage():
    _, cells, _ = drive()
    for stage, wanted in (("search", 4), ("confirm", 3)):
        assert {arm: sum(c.stage == stage and c.arm == arm for c in cells) for arm in OPTIMA} == dict.fromkeys(
            OPTIMA, wanted
        )
    calibrated = [
        sorted((c.config["lr"], c.seed) for c in cells if c.stage == "calibrate" and c.arm == arm) for arm in OPTIMA
    ]
    assert calibrated[0] == calibrated[1] == calibrated[2]  # one shared grid, the same seeds
    assert len({cell.key for cell in cells}) == len(cells)


def test_only_arms_with_hyperparameters_of_their_own_search_if_the_study_says_so():
    stages, cells, decisions = drive(search={"trials_per_arm": 4, "arms": "own"}, nuisance=DECADE)
    assert [cell.arm for cell in cells if cell.stage == "search"] == ["searched"] * 4
    searched = next(fields["best"]["searched"] for event, fields in decisions if event == "grid")
    best = [c.config for c in cells if c.stage == "search"]
    first = next(fields for event, fields in decisions if event == "grid")
    assert searched in best
    assert first["best"]["gelu"] == first["best"]["floor"] == {"lr": pytest.approx(1e-3)}
    middle = geometric_mean([1e-3, 1e-3, searched["lr"]])
    assert first["grid"] == pytest.approx(geometric_grid(middle, 3, 2.0))
    assert {arm: stages.chosen[arm]["lr"] for arm in OPTIMA} == pytest.approx(OPTIMA, rel=0.1)


def test_without_such_arms_calibrate_begins_at_once_in_the_middle_of_the_range():
    arms = {"searched": None, "fixed": {"gate": "sigmoid", "alpha": 0.5}}
    optima = {"gelu": 1e-3, "floor": 1e-3, "fixed": 2e-3}
    stages, cells, _ = drive(search={"arms": "own"}, arms=arms, nuisance=DECADE, optima=optima)
    assert {cell.stage for cell in cells} == {"calibrate", "confirm"}
    assert {arm: stages.chosen[arm]["lr"] for arm in optima} == pytest.approx(optima, rel=0.1)
    study = study_of(STUDY, search={"arms": "own"}, arms=arms)
    assert [arm_trials(study, arm) for arm in optima] == [0, 0, 0]
    assert idle_slots(study, 64) == []


def test_a_study_without_calibrate_does_not_leave_arms_without_a_search():
    with pytest.raises(StudyError, match=r"search.arms: own leaves .* add calibrate to stages"):
        study_of(STUDY, search={"arms": "own"}, stages=["search", "confirm"])


def test_an_arm_that_is_added_later_searches_only_with_hyperparameters_of_its_own():
    study = study_of(STUDY, search={"trials_per_arm": 4, "arms": "own"})
    stages = Stages(study, lambda *_, **__: None, {}, added=[["floor"]])
    assert stages.remaining() == 4 + 3 * (3 * 2 + 3)


def test_cells_do_not_depend_on_slots_or_on_the_order_in_which_they_end():
    keys = [
        sorted(cell.key for cell in drive(seed, slots=slots)[1]) for seed, slots in ((0, 1), (1, 2), (2, 8), (3, 3))
    ]
    assert all(found == keys[0] for found in keys)


def test_seeds_of_search_and_calibration_never_enter_confirm():
    _, cells, _ = drive()
    seeds = {stage: {c.seed for c in cells if c.stage == stage} for stage in ("search", "calibrate", "confirm")}
    assert seeds == {"search": {1}, "calibrate": {11, 12}, "confirm": {101, 102, 103}}


def test_a_study_that_takes_up_another_one_confirms_on_seeds_of_its_own():
    _, cells, _ = drive(confirm={"first_seed": 109})
    assert {c.seed for c in cells if c.stage == "confirm"} == {109, 110, 111}
    _, cells, _ = drive(confirm={"seeds": None, "rule": "obrien-fleming", "first_seed": 109})
    assert min(c.seed for c in cells if c.stage == "confirm") == 109
    with pytest.raises(StudyError, match=r"confirm.first_seed: 12 is not allowed"):  # a seed of the calibration
        drive(confirm={"first_seed": 12})


def test_replicates_share_no_seed_and_no_suggestion():
    first, second, far = (drive(replicate=number)[1] for number in (0, 1, 1000))
    assert [cell.key for cell in first] == [cell.key for cell in drive()[1]]
    seeds = {stage: {c.seed for c in second if c.stage == stage} for stage in ("search", "calibrate", "confirm")}
    wanted = {"search": {1}, "calibrate": {11, 12}, "confirm": {101, 102, 103}}
    assert seeds == {stage: {10_000_000 + seed for seed in some} for stage, some in wanted.items()}
    rates = [{c.config["lr"] for c in cells if c.stage == "search"} for cells in (first, second, far)]
    assert not rates[0] & rates[1] | rates[0] & rates[2] | rates[1] & rates[2]
    _, cells, _ = drive(replicate=2, confirm={"first_seed": 10**6, "seeds": 3})
    assert {c.seed for c in cells if c.stage == "confirm"} == {21_000_000, 21_000_001, 21_000_002}
    most = [ConfirmSection.model_fields[key].metadata[1].le for key in ("first_seed", "seeds")]
    assert sum(most) < SEEDS_APART  # however many seeds from whichever first one, the next replicate has others


def test_a_sequential_rule_of_a_replicate_looks_at_its_own_seeds():
    rule = {"seeds": None, "rule": "obrien-fleming"}
    clear = lambda cell: (cell.arm != "gelu") * (1 + 1e-3 * (cell.seed % 3))  # noqa: E731
    for number in (0, 3):
        _, cells, _ = drive(replicate=number, confirm=rule, extra=clear)
        assert len([cell for cell in cells if cell.stage == "confirm"]) == 3 * 3  # decided at the first look


def test_the_chosen_rate_is_the_bottom_of_the_bowl_and_inside_the_grid():
    stages, _, decisions = drive()
    assert not stages.grid_capped
    for arm, optimum in OPTIMA.items():
        rate = stages.chosen[arm]["lr"]
        assert stages.calibration.grid[0] < rate < stages.calibration.grid[-1]
        assert rate == float(f"{optimum:.4g}")  # the bowl of `drive` is a parabola, without noise between arms
    chosen = {fields["arm"]: fields for event, fields in decisions if event == "chosen"}
    assert all(chosen[arm]["config"] == stages.chosen[arm] and not chosen[arm]["at_edge"] for arm in OPTIMA)


def test_the_grids_best_may_be_chosen_instead():
    stages, _, decisions = drive(calibrate={"choice": "grid"})
    for arm, optimum in OPTIMA.items():
        rate = stages.chosen[arm]["lr"]
        assert rate in stages.calibration.grid
        assert abs(math.log(rate / optimum)) <= math.log(2.0) / 2 + 1e-9  # no other point of the grid is nearer
    assert all(fields["grid_best"] == fields["config"]["lr"] for event, fields in decisions if event == "chosen")


def confirm_seeds(rule, gap, max_seeds=None, **options):
    """Return the baseline's confirm seeds if every arm's loss is `gap` standard deviations above the baseline's."""

    def loss(cell):
        noise = random.Random(f"{cell.arm} {cell.seed}").gauss(0, 1) if cell.stage == "confirm" else 0.0
        return noise + (0.0 if cell.arm == "gelu" else gap)

    confirm = {"seeds": None, "rule": rule, "max_seeds": max_seeds}
    _, cells, _ = drive(confirm=confirm, extra=loss, **options)
    seeds = {arm: sorted(c.seed - 100 for c in cells if c.stage == "confirm" and c.arm == arm) for arm in OPTIMA}
    assert seeds["gelu"] == max(seeds.values())  # pairs are whole
    assert all(found == list(range(1, len(found) + 1)) for found in seeds.values())
    return seeds["gelu"]


@pytest.mark.slow
def test_a_sequential_rule_stops_when_every_arm_is_decided_and_at_its_cap():
    assert confirm_seeds("obrien-fleming", gap=1000.0) == [1, 2, 3]
    assert confirm_seeds("obrien-fleming", gap=5.0) == [1, 2, 3, 4, 5]
    assert confirm_seeds("obrien-fleming", gap=0.0) == list(range(1, 11))
    assert confirm_seeds("e-process", gap=0.0) == list(range(1, 21))
    assert len(confirm_seeds("e-process", gap=5.0)) in range(4, 20)
    assert confirm_seeds("obrien-fleming", gap=0.0, max_seeds=6) == list(range(1, 7))


def test_a_sequential_rule_does_not_depend_on_slots():
    assert len({tuple(confirm_seeds("e-process", gap=4.0, slots=slots, order_seed=slots)) for slots in (1, 3)}) == 1


def test_an_optimum_at_the_edge_extends_the_grid_for_all_arms():
    far = {"gelu": 1e-3, "floor": 1e-3, "searched": 1.6e-2}
    stages, cells, decisions = drive(optima=far, calibrate={"max_points": 20})
    assert stages.calibration.grid[0] < stages.chosen["searched"]["lr"] < stages.calibration.grid[-1]
    grids = [fields["grid"] for event, fields in decisions if event == "grid"]
    assert [len(grid) for grid in grids] == sorted(len(grid) for grid in grids)
    assert len(grids) > 1
    for arm in far:
        rates = {c.config["lr"] for c in cells if c.stage == "calibrate" and c.arm == arm}
        assert rates == set(stages.calibration.grid)
    ratios = [b / a for a, b in zip(stages.calibration.grid, stages.calibration.grid[1:], strict=False)]
    assert ratios == pytest.approx([2.0] * len(ratios))


def test_the_cap_ends_the_extension_and_is_said():
    stages, _, decisions = drive(optima=dict.fromkeys(OPTIMA, 10.0))
    assert len(stages.calibration.grid) == 7
    assert stages.grid_capped
    assert all(fields["at_edge"] for event, fields in decisions if event == "chosen")


def test_the_searched_alpha_is_kept_through_calibrate_and_confirm():
    stages, cells, _ = drive()
    alphas = {c.config["alpha"] for c in cells if c.arm == "searched" and c.stage != "search"}
    assert alphas == {stages.search["searched"].best()["alpha"]}
    assert all("alpha" not in c.config for c in cells if c.arm == "gelu")


def test_an_infeasible_seed_takes_its_learning_rate_out():
    # above 1e-3 one of the two selection seeds diverges
    stages, _, _ = drive(
        outcome=lambda c: (
            "infeasible" if c.stage == "calibrate" and c.seed == 12 and c.config["lr"] > 1.2e-3 else "completed"
        )
    )
    assert all(config["lr"] < 1.2e-3 for config in stages.chosen.values())
    assert math.isinf(stages.calibration.mean("gelu", {"lr": stages.calibration.grid[-1]}))


def test_the_mean_of_a_point_does_not_depend_on_the_order_in_which_its_trials_end():
    stages, _, _ = drive(calibrate={"seeds": 3})
    losses = {11: 0.1, 12: 0.2, 13: 0.3}  # 0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in the last place
    means = set()
    for seeds in itertools.permutations(losses):
        key = digest({"lr": 1e-3})
        stages.calibration._losses = {("gelu", key, seed): losses[seed] for seed in seeds}
        means.add(stages.calibration.mean("gelu", {"lr": 1e-3}))
    assert means == {math.fsum(losses.values()) / 3}


def test_nothing_feasible_ends_the_study_before_it_costs_more():
    stages, cells, _ = drive(outcome=lambda cell: "infeasible")
    assert stages.hopeless
    assert {cell.stage for cell in cells} == {"search"}


def test_confirm_finishes_seeds_together_so_that_pairs_are_whole():
    _, cells, _ = drive(slots=1)
    confirm = [cell for cell in cells if cell.stage == "confirm"]
    assert [cell.seed for cell in confirm] == sorted(cell.seed for cell in confirm)


def test_remaining_counts_down_to_nothing():
    stages = Stages(study_of(STUDY), lambda event, **fields: None, {})
    assert stages.remaining() == 3 * (4 + 3 * 2 + 3)
    assert drive()[0].remaining() == 0


def test_grid_is_geometric_around_its_centre():
    assert geometric_grid(1e-3, 3, 2.0) == pytest.approx([5e-4, 1e-3, 2e-3])
    assert geometric_grid(1e-3, 4, 4.0) == pytest.approx([1.25e-4, 5e-4, 2e-3, 8e-3])
    assert geometric_mean([1e-4, 1e-2]) == pytest.approx(1e-3)
