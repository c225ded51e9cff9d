"""Test the progress of a study from a handmade ledger: counts, bests, plans, time left and speed."""

import pytest

from tests.studies import TOLD, study_of
from tune.run.progress import Best, Progress


def counts(progress, stage, **arm):
    return [progress.count(stage, s, **arm) for s in ("completed", "running", "stopped_early", "infeasible", "failed")]


def test_counts_are_those_of_the_events(plan, searching):
    progress = Progress(plan, searching.events)
    assert counts(progress, "search") == [3, 1, 1, 1, 0]
    assert counts(progress, "search", arm="floor") == [1, 1, 1, 0, 0]
    assert counts(progress, "confirm") == [0] * 5
    assert (progress.ended, progress.running, progress.stage, progress.finished) == (5, 1, "search", False)


def test_the_best_of_search_is_the_lowest_loss_and_its_rate(plan, searching):
    progress = Progress(plan, searching.events)
    assert progress.best("search", "gelu") == Best(3.9, {"lr": 3e-3}, 1)
    assert progress.best("search", "floor") == Best(4.2, {"lr": 2e-3}, 1)  # not the lower loss of a stopped trial
    assert progress.best("confirm", "gelu") is None


def test_the_best_of_calibrate_is_a_mean_over_all_seeds_that_there_are(plan, told):
    for seed, losses in ((11, (4.0, 3.0, 3.5)), (12, (4.0, 3.8, 3.1))):
        for rate, loss in zip((1e-3, 2e-3, 4e-3), losses, strict=True):
            told.cell("calibrate", "gelu", loss, seed=seed, lr=rate)
    found = Progress(plan, told.events).best("calibrate", "gelu")
    assert found.loss == pytest.approx((3.5 + 3.1) / 2, abs=1e-12)
    assert (found.setting, found.n) == ({"lr": 4e-3}, 2)
    one = Progress(plan, told.events[: 3 * 5 - 3]).best("calibrate", "gelu")  # a second seed only of the first rate
    assert (one.loss, one.setting, one.n) == (4.0, {"lr": 1e-3}, 2)


def test_confirm_gives_the_mean_and_its_number_of_seeds(plan, told):
    for seed, loss in ((101, 4.0), (102, 4.3)):
        told.cell("confirm", "gelu", loss, seed=seed, lr=2e-3)
    told.cell("confirm", "gelu", None, seed=103, lr=2e-3, outcome="infeasible")
    found = Progress(plan, told.events).best("confirm", "gelu")
    assert (found.loss, found.n) == (pytest.approx(4.15, abs=1e-12), 2)


def test_a_cell_that_failed_and_runs_again_is_counted_once(plan, told):
    key = told.start("search", "gelu")
    told.end(key, outcome="failed")
    assert counts(Progress(plan, told.events), "search") == [0, 0, 0, 0, 1]
    told.add("started", cell=key)
    assert counts(Progress(plan, told.events), "search") == [0, 1, 0, 0, 0]
    told.end(key, 4.0)
    assert counts(Progress(plan, told.events), "search") == [1, 0, 0, 0, 0]


def test_cells_that_an_earlier_run_left_do_not_run(plan, searching):
    progress = Progress(plan, searching.events)
    progress.set_running(("search/floor/2/1",))
    assert progress.running == 1
    progress.set_running(())
    assert (progress.running, progress.count("search", "waiting"), progress.tokens_per_second) == (0, 1, None)


def test_the_plan_is_a_range_until_it_is_decided(plan, searching):
    progress = Progress(plan, searching.events)
    assert progress.planned("search") == (6, 6, 6)
    least, likely, most = progress.planned("calibrate")
    assert (least, most) == (2 * 3 * 2, 2 * 5 * 2)
    assert least <= likely <= most
    assert progress.planned("confirm") == (6, 6, 6)
    searching.add("grid", grid=[1e-3, 2e-3, 4e-3, 8e-3], best={})
    assert Progress(plan, searching.events).planned("calibrate")[0] == 2 * 4 * 2
    searching.add("chosen", arm="gelu", config={"lr": 1e-3}, config_key="k")
    assert Progress(plan, searching.events).planned("calibrate") == (16, 16, 16)


def test_the_looks_of_a_sequential_rule_are_a_range(told):
    rule = study_of(TOLD, confirm={"seeds": None, "rule": "obrien-fleming"})
    assert Progress(rule).planned("confirm") == (2 * 3, 2 * 10, 2 * 10)
    for seed in range(101, 105):
        for arm in ("gelu", "floor"):
            told.cell("confirm", arm, 4.0, seed=seed)
    assert Progress(rule, told.events).planned("confirm") == (2 * 5, 2 * 10, 2 * 10)


def test_nothing_follows_a_search_that_lost_every_trial(plan, told):
    for index in range(3):
        for arm in ("gelu", "floor"):
            told.cell("search", arm, None, index=index, outcome="infeasible")
    progress = Progress(plan, told.events)
    assert progress.planned("confirm") == (0, 0, 0)
    assert progress.finished


def test_the_time_left_is_the_work_over_the_slots(plan, told):
    for index in range(3):
        told.cell("search", "gelu", 4.0, 10.0, index=index)
        told.cell("search", "floor", 4.0, 30.0, index=index)
    told.add("grid", grid=[1e-3, 2e-3, 4e-3], best={})
    told.add("chosen", arm="gelu", config={"lr": 1e-3}, config_key="k")
    left = 6 * (10.0 + 30.0) + 3 * (10.0 + 30.0)  # 3 points x 2 seeds of calibrate, 3 seeds of confirm, of each arm
    for slots in (1, 2, 4):
        assert Progress(plan, told.events).seconds_left(slots, told.now) == (left / slots, left / slots)
    key = told.start("calibrate", "floor", seed=11)
    assert Progress(plan, told.events).seconds_left(1, told.now + 12.0) == (left - 12.0, left - 12.0)
    assert Progress(plan, told.events).seconds_left(10_000, told.now + 12.0)[0] == 18.0  # the running one ends later
    assert Progress(plan, told.events).seconds_left(0, told.now) is None
    told.now += 50.0  # its own stage is slower than the search was
    told.end(key, 4.0)
    slower = 5 * 50.0 + 6 * 10.0 + 3 * (10.0 + (90.0 + 50.0) / 4)
    assert Progress(plan, told.events).seconds_left(1, told.now)[0] == pytest.approx(slower)


def test_before_a_cell_has_ended_the_speed_that_is_reported_counts(plan, told):
    key = told.start("search", "gelu")
    assert Progress(plan, told.events).seconds_left(1, told.now) is None
    told.report(key, 409.6)  # 4,096 tokens take 10 s
    progress = Progress(plan, told.events)
    least = 10.0 * (6 + 12 + 6)
    assert (
        least <= progress.seconds_left(1, told.now)[0] <= progress.seconds_left(1, told.now)[1] == 10.0 * (6 + 20 + 6)
    )


def test_the_imports_of_the_workers_are_not_taken_for_training(plan, told):
    """Let the first cell of each slot wait 20 s for its worker. Only its training counts; later cells count in full."""
    keys = [told.start("search", arm) for arm in ("gelu", "floor")]
    told.now += 21.0
    told.report(keys[0], 4096.0)
    for key in keys:
        told.add("ended", cell=key, outcome="completed", final={"val_nll": 4.0, "seconds": 1.0}, reason=None)
    assert Progress(plan, told.events).seconds_left(1, told.now)[1] == 4 + 20 + 6  # seconds, one a cell
    key = told.start("search", "gelu", index=1)
    told.now += 3.0
    told.add("ended", cell=key, outcome="completed", final={"val_nll": 4.0, "seconds": 1.0}, reason=None)
    gelu = (1.0 + 3.0) / 2
    assert Progress(plan, told.events).seconds_left(1, told.now)[1] == gelu * (1 + 10 + 3) + 1.0 * (2 + 10 + 3)


def test_the_speed_is_that_of_all_running_cells(plan, searching):
    assert Progress(plan, searching.events).tokens_per_second == 250.0
    searching.start("search", "gelu", index=7)  # has not said its speed yet, as no gelu before it
    assert Progress(plan, searching.events).tokens_per_second == 500.0
