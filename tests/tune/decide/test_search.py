import math
import random

import optuna
import pytest

from tune.decide.search import ArmSearch, distribution, make_sampler
from tune.study.sections import Distribution, SearchSection

SPACE = {"lr": Distribution(loguniform=[1e-4, 1e-2]), "alpha": Distribution(uniform=[0.0, 2.0])}


def bowl(config):
    return (config["alpha"] - 0.7) ** 2 + abs(config["lr"] - 1e-3) * 100 + 1.0


def run(order_seed, **settings):
    """Return all configurations of a search whose running trials end in a random order."""
    search = ArmSearch("arm", SPACE, SearchSection(**settings))
    rng, running, configs = random.Random(order_seed), [], []
    while not search.done:
        while search.may_suggest():
            index, config = search.suggest()
            configs.append(config)
            running.append((index, config))
        index, config = running.pop(rng.randrange(len(running)))
        search.finish(index, "completed", bowl(config), 10)
    return configs, search


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
@pytest.mark.parametrize("parallel", [1, 3])
def test_suggestions_do_not_depend_on_the_order_in_which_trials_end(sampler, parallel):
    runs = [run(seed, trials_per_arm=9, sampler=sampler, parallel=parallel)[0] for seed in range(4)]
    assert all(configs == runs[0] for configs in runs)
    assert len({config["lr"] for config in runs[0]}) == 9
    assert all(1e-4 <= config["lr"] <= 1e-2 and 0 <= config["alpha"] <= 2 for config in runs[0])


def test_tpe_learns_from_what_it_sees():
    # three quarters of the later suggestions closer to the bowl's bottom than random ones on average
    guided, _ = run(0, trials_per_arm=40, sampler="tpe")
    blind, _ = run(0, trials_per_arm=40, sampler="random")
    mean = lambda configs: sum(map(bowl, configs[20:])) / 20  # noqa: E731
    assert mean(guided) < 0.8 * mean(blind)


def test_recorded_suggestions_are_taken_as_they_stand_and_the_next_ones_follow():
    configs, _ = run(0, trials_per_arm=8, sampler="tpe")
    search = ArmSearch("arm", SPACE, SearchSection(trials_per_arm=8))
    for i, config in enumerate(configs[:5]):
        assert search.suggest(config) == (i, config)
        search.finish(i, "completed", bowl(config), 10)
    for i in range(5, 8):
        assert search.suggest() == (i, configs[i])
        search.finish(i, "completed", bowl(configs[i]), 10)
    assert not search.may_suggest()


def test_parallel_limits_how_far_suggestions_run_ahead():
    search = ArmSearch("arm", SPACE, SearchSection(trials_per_arm=5, parallel=2))
    search.suggest()
    search.suggest()
    assert not search.may_suggest()
    search.finish(1, "completed", 1.0, 1)
    assert not search.may_suggest()  # trial 2 must see trial 0
    search.finish(0, "completed", 1.0, 1)
    assert search.may_suggest()


def test_outcomes_reach_optuna_as_what_they_are():
    search = ArmSearch("arm", SPACE, SearchSection(trials_per_arm=4))
    for i, (outcome, loss) in enumerate([("completed", 2.0), ("stopped_early", 3.0), ("infeasible", float("inf"))]):
        search.suggest()
        search.finish(i, outcome, loss, 5)
    search.suggest()
    told = search._study
    states = [trial.state.name for trial in told.trials]
    assert states == ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert told.best_value == 2.0
    assert told.trials[1].intermediate_values == {5: 3.0}


def test_best_is_a_trial_trained_to_its_end():
    search = ArmSearch("arm", SPACE, SearchSection(trials_per_arm=3))
    configs = []
    for i, (outcome, loss) in enumerate([("completed", 2.0), ("stopped_early", 1.0), ("completed", 1.9)]):
        configs.append(search.suggest()[1])
        search.finish(i, outcome, loss, 5)
    assert search.best() == configs[2]


def test_without_a_trial_trained_to_its_end_the_first_suggestion_stands():
    search = ArmSearch("arm", SPACE, SearchSection(trials_per_arm=1))
    _, config = search.suggest()
    search.finish(0, "infeasible", float("inf"), 1)
    assert search.best() == config
    assert not search.feasible


def test_early_stopping_spares_half_the_budget_and_keeps_the_better_half():
    search = ArmSearch("arm", SPACE, SearchSection(trials_per_arm=9))
    for i, loss in enumerate([3.0, 2.0]):  # the first two always continue
        search.suggest()
        assert not search.should_stop(i, 0.5, loss)
        search.finish(i, "completed", loss, 10)
    search.suggest()
    assert not search.should_stop(2, 0.4, 99.0)  # before half of the budget
    assert search.should_stop(2, 0.5, 3.5)  # worst of three
    search.finish(2, "stopped_early", 3.5, 5)
    search.suggest()
    assert not search.should_stop(3, 0.6, 2.5)  # second of four
    assert not search.should_stop(3, 0.8, 99.0)  # one rung: it is not asked again
    search.finish(3, "completed", 2.5, 10)
    search.suggest()
    assert search.should_stop(4, 0.5, 3.1)  # fourth of five


def test_early_stopping_does_not_look_at_trials_that_may_not_have_ended():
    search = ArmSearch("arm", SPACE, SearchSection(trials_per_arm=9, parallel=3))
    for i, loss in enumerate([1.0, 1.1, 1.2]):
        search.suggest()
        assert not search.should_stop(i, 0.5, loss)
    search.finish(0, "completed", 1.0, 10)
    search.suggest()
    assert not search.should_stop(3, 0.5, 99.0)  # sees trial 0 alone


def by_definition(halfway, index, loss, settings):
    """Return True if a trial has to stop, computed from all losses at the rung."""
    others = [halfway.get(i, math.inf) for i in range(index - settings.parallel + 1)]
    better = sum(other < loss for other in others)
    return len(others) >= 2 and better >= max(1.0, settings.keep * (len(others) + 1))


@pytest.mark.parametrize("parallel", [1, 2, 5])
@pytest.mark.parametrize("seed", range(5))
def test_a_running_rank_stops_what_the_definition_stops(parallel, seed):
    """Let trials reach the rung and end in a random order. Some never reach it, some have a NaN without a rank."""
    settings, rng = SearchSection(trials_per_arm=60, parallel=parallel), random.Random(seed)
    search, halfway, running, stops = ArmSearch("arm", SPACE, settings), {}, [], []
    while not search.done:
        while search.may_suggest():
            running.append([search.suggest({"lr": 1e-3, "alpha": 1.0})[0], rng.random() < 0.9])
        trial = rng.choice(running)
        index, asks = trial
        if asks:
            trial[1] = False
            loss = rng.choice([round(rng.random(), 1), rng.random(), rng.random(), rng.choice([math.inf, math.nan])])
            wanted = by_definition(halfway, index, loss, settings)
            assert search.should_stop(index, 0.5, loss) is wanted
            halfway[index] = loss
            stops.append(wanted)
        else:
            running.remove(trial)
            search.finish(index, "completed", 1.0, 10)
    assert 5 < sum(stops) < len(stops) - 5


class Counted(float):
    """Loss that counts how often losses are compared."""

    comparisons = 0

    def __lt__(self, other):
        Counted.comparisons += 1
        return float(self) < float(other)

    __gt__ = None  # nothing is compared uncounted


def test_a_stop_costs_a_search_in_a_sorted_list_and_not_a_look_at_every_trial():
    trials, parallel = 500, 3
    settings, rng = SearchSection(trials_per_arm=trials, parallel=parallel), random.Random(0)
    search, Counted.comparisons = ArmSearch("arm", SPACE, settings), 0
    for index in range(trials):
        search.should_stop(index, 0.5, Counted(rng.random()))
    assert trials < Counted.comparisons < trials * (2 * math.log2(trials) + parallel + 2) < trials**2 / 4


def test_no_pruner_never_stops():
    search = ArmSearch("arm", SPACE, SearchSection(trials_per_arm=9, pruner="none"))
    for i in range(5):
        search.suggest()
        assert not search.should_stop(i, 0.5, float(i))
        search.finish(i, "completed", float(i), 10)


def test_distributions_are_optunas():
    assert distribution(Distribution(uniform=[0.0, 2.0])) == optuna.distributions.FloatDistribution(0.0, 2.0)
    assert distribution(SPACE["lr"]) == optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    assert distribution(Distribution(choice=[1.0, 10.0])) == optuna.distributions.CategoricalDistribution([1.0, 10.0])
    assert isinstance(make_sampler("tpe", 1, 30), optuna.samplers.TPESampler)


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_each_replicate_searches_other_points(sampler):
    def rates(replicate):
        search, found = ArmSearch("arm", SPACE, SearchSection(trials_per_arm=9, sampler=sampler), 0, replicate), []
        while search.may_suggest():
            index, config = search.suggest()
            found.append(config["lr"])
            search.finish(index, "completed", 3.0 + abs(math.log(config["lr"] / 1e-3)), 10)
        return found

    assert rates(1) == rates(1)
    assert len({*rates(0), *rates(1), *rates(2)}) == 27


# --- spaces with few points ------------------------------------------------------------------------------------------

CHOICES = {"lr": Distribution(choice=[1e-3, 2e-3, 4e-3])}
TWO = {**CHOICES, "alpha": Distribution(choice=[0.0, 0.5, 1.0])}  # nine points


def searched(space, recorded=(), **settings):
    """Return all configurations of a search of choices. The first ones are those of a ledger."""
    search, configs = ArmSearch("arm", space, SearchSection(**settings), len(recorded)), []
    while search.may_suggest():
        given = recorded[len(configs)] if len(configs) < len(recorded) else None
        index, config = search.suggest(given)
        configs.append(config)
        search.finish(index, "completed", 1.0 + 100 * config["lr"] + config.get("alpha", 0.0), 10)
    assert search.done
    return configs


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
@pytest.mark.parametrize(("space", "points"), [(CHOICES, 3), (TWO, 9)], ids=["one", "two"])
def test_no_configuration_is_tried_twice_and_a_search_ends_with_its_last_one(sampler, space, points):
    for trials in (2, points - 1, points, points + 1, 2 * points, 40):
        configs = searched(space, trials_per_arm=trials, sampler=sampler)
        assert len(configs) == len({tuple(config.values()) for config in configs}) == min(trials, points)
        assert all(config["lr"] in CHOICES["lr"].values for config in configs)


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_a_replay_of_choices_gives_the_same_configurations(sampler):
    configs = searched(TWO, trials_per_arm=9, sampler=sampler)
    for known in range(10):
        assert searched(TWO, configs[:known], trials_per_arm=9, sampler=sampler) == configs


def test_a_ledger_with_repeated_configurations_is_followed_as_it_is():
    old = [{"lr": 1e-3}, {"lr": 1e-3}, {"lr": 4e-3}, {"lr": 1e-3}]
    assert searched(CHOICES, old, trials_per_arm=6) == old
    assert searched(CHOICES, old[:2], trials_per_arm=6)[:2] == old[:2]
    assert len(searched(CHOICES, old[:2], trials_per_arm=6)) == 3


def test_the_search_of_choices_learns():
    space = {name: Distribution(choice=[round(0.1 * i, 1) for i in range(10)]) for name in ("lr", "alpha")}
    found = searched(space, trials_per_arm=40)
    assert min(100 * c["lr"] + c["alpha"] for c in found[:40]) < 1.0
    mean = lambda configs: sum(c["lr"] for c in configs) / len(configs)  # noqa: E731
    assert mean(found[20:]) < mean(searched(space, trials_per_arm=40, sampler="random")[20:])


def test_a_range_is_never_seen_as_few_points():
    mixed = {**CHOICES, "alpha": Distribution(uniform=[0.0, 1.0])}
    assert len(searched(mixed, trials_per_arm=7)) == 7
