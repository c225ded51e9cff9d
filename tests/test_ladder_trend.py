"""The benchmark of the trend of a ladder: its laws, its table on the page, and the goals."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.verdict.kinds import Verdict
from analysis.verdict.ladder.kinds import Trend

ROOT = Path(__file__).parent.parent
BENCHMARKS = str(ROOT / "benchmarks")


@pytest.fixture(scope="module")
def ladder_trend():
    """Return the benchmark, whose folder is not a package."""
    sys.path.insert(0, BENCHMARKS)
    import ladder_trend

    yield ladder_trend
    sys.path.remove(BENCHMARKS)


def test_the_page_has_the_tables_of_its_results_and_meets_the_goals(ladder_trend, tmp_path):
    found = json.loads((ROOT / "docs" / "ladder_trend.json").read_text())
    page = (ROOT / "docs" / "protocol.md").read_text()
    assert ladder_trend.markdown(found["results"]) in page
    assert ladder_trend.compared(found["remedies"]) in page
    rows = {(row["law"], row["rule"], row["calibrated"]): row for row in found["results"]}
    assert set(rows) == {(law, rule, c) for law in ladder_trend.LAWS for rule in ladder_trend.RULES for c in (0, 1)}
    for row in rows.values():  # a row of few ladders may miss a goal by chance, but its interval does not
        assert row["coverage"]["high"] >= 0.94
        assert row["false"]["low"] <= 0.05
        if not row["calibrated"]:
            assert row["coverage"]["share"] >= 0.94
            assert row["false"]["share"] <= 0.05
    none, *_, used = (row for row in found["remedies"] if row["rule"] == "obrien-fleming")
    assert none["least"]["share"] < 0.94 <= used["least"]["share"]
    other = tmp_path / "page.md"
    other.write_text(
        "a\n" + "".join(begin + "old\n" + end + "\n" for begin, end in ladder_trend.MARKS.values()) + "z\n"
    )
    ladder_trend.write(found, other)
    text = other.read_text()
    assert "old" not in text
    assert text.startswith("a\n<!-- ladder trend: start -->\n| law ")
    assert text.endswith("z\n")


def test_drawn_rungs_have_the_effects_and_verdicts_of_their_law(ladder_trend):
    law = ladder_trend.LAWS["gain that changes sign"]
    arms = ladder_trend.ladder(law, "obrien-fleming", 3)
    assert [pairs.kind for pairs in arms["searched"]] == [Verdict.BETTER, Verdict.NO_DIFFERENCE, Verdict.WORSE]
    gains = np.mean(
        [
            [100 * (1 - p.arm.mean() / p.baseline.mean()) for p in ladder_trend.ladder(law, "fixed", seed)["searched"]]
            for seed in range(30)
        ],
        axis=0,
    )
    assert gains == pytest.approx([1.7, 0.0, -1.7], abs=0.08)
    assert all(len(pairs.arm) == 8 and not pairs.stopped for pairs in ladder_trend.ladder(law, "fixed", 1)["first"])


def test_a_law_without_its_gain_is_said_to_be_false(ladder_trend):
    steep = replace(ladder_trend.LAWS["no gain"], shares=(0.0, 1.0, 2.0))
    said = ladder_trend.drawn(steep, "fixed", 1)
    assert said["searched"].trend is Trend.GROWS
    row = ladder_trend.summary("no gain", "fixed", False, [said])
    assert row["false"]["hits"] == 1
    plain = ladder_trend.drawn(ladder_trend.LAWS["no gain"], "fixed", 1)
    assert ladder_trend.summary("no gain", "fixed", False, [plain])["false"]["hits"] == 0


def test_a_remedy_widens_intervals_of_arms_that_a_look_ended(ladder_trend):
    found = ladder_trend.remedied("obrien-fleming", range(2))
    none, pooled, fewer, used = (found[name] for name in ladder_trend.REMEDIES)
    for key in none:
        assert none[key][1] <= used[key][1] <= fewer[key][1]
        assert none[key][1] <= pooled[key][1]
    assert any(used[key][1] > none[key][1] for key in none)


@pytest.mark.slow
def test_all_stages_of_a_ladder_give_the_trends_of_its_law(ladder_trend):
    for rule in ladder_trend.RULES:
        said = ladder_trend.whole(ladder_trend.LAWS["gain that shrinks to zero"], rule, 4)
        assert set(said) == set(ladder_trend.LARGEST)
        assert said["searched"].trend is Trend.SHRINKS
