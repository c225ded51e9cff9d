"""Check what benchmarks/replicates.py computes from repeated studies, and that a replicate is a study of its own."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import replicates
from replicates import Repeated
from scipy import stats

from tune.backend.inline import Inline
from tune.run.study_run import StudyRun
from tune.run.tables import write_tables
from tune.study.files import dump
from tune.subject.known import Known


def drawn(between: float, count: int, seed: int = 0) -> list[Repeated]:
    """Draw studies of 6 seeds with a standard error of 0.5, whose true improvements have the standard deviation."""
    rng, out = np.random.default_rng(seed), []
    for number in range(count):
        x = 1.0 + between * rng.standard_normal() + 0.5 * math.sqrt(6) * rng.standard_normal(6)
        low, high = stats.ttest_1samp(x, 0.0).confidence_interval()
        out.append(Repeated(number, "relu2", "better", float(x.mean()), low, high, 6, 1e-3, None))
    return out


def test_the_page_has_the_table_of_its_results():
    docs = Path(__file__).parents[1] / "docs"
    rows = [Repeated(**row) for row in json.loads((docs / "replicates.json").read_text())]
    assert replicates.markdown(rows) in (docs / "protocol.md").read_text()
    assert len({row.replicate for row in rows}) >= 12


def test_intervals_that_tell_all_cover_each_other_as_often_as_student_says():
    found = replicates.spread(drawn(0.0, 400))
    angle = math.atan(2.570582 / math.sqrt(2) / math.sqrt(5))  # the distribution of t with 5 df in closed form
    inside = 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * (1 + 2 / 3 * math.cos(angle) ** 2))
    assert found["covered_wanted"] == pytest.approx(inside, abs=1e-6)
    assert found["covered"] == pytest.approx(found["covered_wanted"], abs=0.02)
    assert found["error"] == pytest.approx(0.5, rel=0.05)
    assert found["sd"] == pytest.approx(0.5, rel=0.1)
    assert found["sd_low"] < 0.5 < found["sd_high"]


def test_a_spread_between_studies_shows_in_the_sd_and_in_intervals_that_miss_each_other():
    found = replicates.spread(drawn(1.0, 400))
    assert found["error"] == pytest.approx(0.5, rel=0.05)
    assert found["sd"] == pytest.approx(math.hypot(1.0, 0.5), rel=0.1)
    assert found["covered"] < 0.7
    twelve = replicates.spread(drawn(0.0, 12))
    limits = [twelve["sd"] * math.sqrt(11 / q) for q in (21.920, 3.816)]  # chi-squared with 11 df, from a printed table
    assert [twelve["sd_low"], twelve["sd_high"]] == pytest.approx(limits, rel=1e-4)


def test_a_replicate_is_a_whole_study_and_its_row_has_what_it_chose(tmp_path, monkeypatch):
    def simulated(study, base, output, backend):
        def loss(cell, share):
            gap = {"gelu": 0.0, "relu2": -0.03, "paglu-searched": 0.0}[cell.arm]
            bowl = 0.05 * math.log(cell.config["lr"] / 1e-2) ** 2
            return 3.0 + gap + bowl + 0.002 * math.sin(cell.seed + 7 * len(cell.arm))

        folder = output / study.name
        folder.mkdir()
        run = StudyRun(study, folder, Known(study, loss))
        Inline().train(run)
        run.close()
        (folder / "study.yaml").write_text(dump(study))
        write_tables(study.name, run.ledger.events, folder)

    monkeypatch.setattr(replicates, "sweep", simulated)
    rows = [row for number in (1, 2) for row in replicates.repeat(number, tmp_path)]
    assert [(row.replicate, row.arm) for row in rows] == [
        (number, arm) for number in (1, 2) for arm in ("relu2", "paglu-searched")
    ]
    assert {row.verdict for row in rows if row.arm == "relu2"} == {"better"}
    assert all(row.low < row.improvement < row.high and row.n == 6 for row in rows)
    assert all(row.improvement == pytest.approx(1.0, abs=0.2) for row in rows if row.arm == "relu2")
    assert all(row.lr == pytest.approx(1e-2, rel=0.1) for row in rows)
    chosen = {row.replicate: row.alpha for row in rows if row.arm == "paglu-searched"}
    assert chosen[1] != chosen[2]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{replicates.START}\nbefore this\n{replicates.END}\nafter\n")
    replicates.write(rows, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert "before this" not in text
    assert text.count("| relu2 | 2 | +1.0") == 1
    assert f"alpha {chosen[2]:.2f} |" in text
