"""Check the warning on runs far from the rest: in studies whose spikes can be seen, and rarely with normal noise."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.io.assemble import assemble
from analysis.stats.outliers import far_off, far_residuals
from analysis.verdict.decide import decide

SD, SPIKE, SHARE = 0.006, 0.1, 0.1  # nats, as in the spiked studies of docs/protocol.md


def study(rng, spiked=(), spike=SPIKE, noise="normal", points=3, selection=2, n=8, arms=("gelu", "a", "b", "c")):
    """Make a study whose arms have one true mean; spiked arms have spikes in a tenth of their runs, in all stages."""

    def runs(arm, count):
        own = rng.standard_normal(count) if noise == "normal" else rng.standard_t(3, count) / np.sqrt(3)
        return SD * own + (spike * ((rng.random(count) < SHARE) - SHARE) if arm in spiked else 0.0)

    rows, shared = [], rng.normal(0, 0.012, 200)
    for arm in arms:
        for point in range(points):
            loss = 3.3 + 0.03 * (point - 1) ** 2 + shared[11 : 11 + selection] + runs(arm, selection)
            rows += [("calibrate", arm, 11 + i, 1e-3 * 2**point, x) for i, x in enumerate(loss)]
        rows += [("confirm", arm, 101 + i, 1e-3, x) for i, x in enumerate(3.3 + shared[101 : 101 + n] + runs(arm, n))]
    table = pd.DataFrame(rows, columns=["stage", "arm", "seed", "lr", "val_nll"])
    settings = {"nuisance": {"lr": {"loguniform": [1e-4, 1e-1]}}}
    return assemble("x", "x", table.assign(outcome="completed"), pd.DataFrame(), settings, baseline="gelu")


def test_a_value_far_from_the_rest_is_the_outlier_of_a_t_test_by_hand():
    x = np.array([0.1, -0.2, 0.05, 0.15, -0.1, 0.0, 0.2, 3.0])
    rest = x[:7]
    t = (3.0 - rest.mean()) / (rest.std(ddof=1) * np.sqrt(1 + 1 / 7))
    p = 8 * 2 * stats.t.sf(t, 6)
    assert far_off(x, 1.01 * p) == [7]
    assert far_off(x, 0.5 * p) == []
    assert far_off(np.array([0.1, -0.2, 0.05, 5.1, 0.15, -0.1, 0.2, 5.0]), 0.01) == [
        3,
        7,
    ]  # they do not hide each other
    assert far_off(np.array([0.1, 9.0, 0.1]), 0.01) == far_off(np.zeros(9), 0.01) == []
    assert far_off(np.append(np.random.default_rng(0).normal(size=60), 9), 0.01) == []  # one in 61 hardly matters
    bound = stats.t.isf(0.01 / 6, 7)
    assert far_residuals(np.array([0.1, -1.01 * bound, 0.99 * bound]), 1.0, 7, 0.01) == [1]


@pytest.mark.parametrize("n", [5, 8, 12])
def test_normal_noise_rarely_has_a_value_far_from_the_rest(n):
    rng = np.random.default_rng(n)
    share = np.mean([bool(far_off(rng.normal(size=n), 0.02)) for _ in range(200)])
    assert share <= 0.02 * 2 * 2  # two numbers of values, and chance


def test_the_run_is_named_where_a_reader_looks():
    rng = np.random.default_rng(0)
    table = study(rng)
    one = (table.trials["stage"] == "confirm") & (table.trials["arm"] == "a") & (table.trials["seed"] == 104)
    table.trials.loc[one, "val_nll"] += 0.2
    result = decide(table)
    a, b, c = result.comparisons
    assert (a.odd_runs, b.odd_runs, c.odd_runs) == (["seed 104"], [], [])
    assert "runs far from the rest: seed 104; if an arm has rare runs that end far off" in a.why
    assert "Warning: runs far from the rest: a (seed 104); if an arm has rare runs that end far off" in result.summary


def test_a_spike_in_the_calibration_is_seen_if_the_confirm_runs_have_none():
    table = study(np.random.default_rng(1))
    one = (table.trials["stage"] == "calibrate") & (table.trials["arm"] == "b") & (table.trials["seed"] == 12)
    table.trials.loc[one & (table.trials["lr"] == 4e-3), "val_nll"] += 0.1
    assert [row.odd_runs for row in decide(table).comparisons] == [[], ["b calibrate seed 12"], []]


def test_a_noisy_arm_is_not_odd():
    rng, warned = np.random.default_rng(2), 0
    for _ in range(6):
        table = study(rng)
        noisy = table.trials["arm"] == "b"
        table.trials.loc[noisy, "val_nll"] += rng.normal(0, 4 * SD, noisy.sum())
        warned += any(row.odd_runs for row in decide(table).comparisons)
    assert warned <= 1


@pytest.mark.slow
def test_how_often_it_warns():
    """Of the wrong verdicts, those whose arm had a spike in any stage are warned of; normal studies rarely are."""
    rng, studies = np.random.default_rng(3), 150
    normal = sum(any(row.odd_runs for row in decide(study(rng)).comparisons) for _ in range(studies))
    assert normal / studies < 0.05
    for points, selection in ((3, 2), (5, 3)):
        wrong = warned = seen = seen_warned = 0
        for _ in range(studies):
            table = study(rng, spiked=("b",), points=points, selection=selection)
            row = decide(table).comparisons[1]
            if row.kind in ("better", "worse"):
                runs = table.trials[table.trials["arm"] == "b"]
                left = runs["val_nll"] - runs.groupby(["stage", "lr"])["val_nll"].transform("min")
                spike = bool((left > 0.05).any())
                wrong, warned = wrong + 1, warned + bool(row.odd_runs)
                seen, seen_warned = seen + spike, seen_warned + (spike and bool(row.odd_runs))
        assert wrong / studies > 0.15
        assert seen_warned >= 0.75 * seen
        assert warned / wrong > (0.3 if points == 3 else 0.6)
