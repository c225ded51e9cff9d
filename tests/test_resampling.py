"""The benchmark of seeds that split one data set, and what docs/protocol.md has of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import resampling
from scipy import stats

DOCS = Path(__file__).parents[1] / "docs"


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


def test_the_page_has_the_table_and_what_it_says_of_it_holds():
    rows = json.loads((DOCS / "resampling.json").read_text())
    assert resampling.markdown(rows) in (DOCS / "protocol.md").read_text(encoding="utf-8")
    assert [resampling.Setting(**row["setting"]) for row in rows] == list(resampling.SETTINGS)
    for row in rows:
        setting, of = resampling.Setting(**row["setting"]), row["of"]
        assert of >= 1000
        plain, corrected = (
            stats.binomtest(row["wrong"][key], of).proportion_ci(0.999) for key in ("plain", "corrected")
        )
        if setting.how == "fresh":  # the two learners are equally good
            assert plain.low < 0.05 < plain.high
            continue
        assert corrected.low <= (0.05 if setting.learner == resampling.SQUARES else 0.1)
        assert setting.how == "folds" or plain.low > 0.08
