"""The benchmark of seeds that split one data set."""

import numpy as np
import pytest
import resampling


def test_splits_have_the_sizes_that_they_say():
    for setting in resampling.SETTINGS:
        seen = list(resampling.drawn(setting, np.random.default_rng(0)))
        assert len(seen) == setting.splits
        for x, y, train, test in seen:
            assert len(x) == len(y) == setting.rows
            assert not set(train) & set(test)
            assert len(test) / len(train) == pytest.approx(setting.overlap)
        if setting.how == "folds":
            assert len({row for *_, test in seen for row in test}) == setting.rows
        assert all((each[0] is seen[0][0]) != (setting.how == "fresh") for each in seen[1:])


def test_the_plain_test_errs_and_the_corrected_one_does_so_far_less():
    found = resampling.simulate(resampling.SETTINGS[2], 60)["wrong"]
    assert found["plain"] > 6 > found["corrected"]
