"""Tests of the samples of kept models in a report: their order, their characters, gaps and refused tables."""

import pandas as pd
import pytest

from analysis.describe.samples import Continued, by_prompt
from analysis.io.files import TableError
from analysis.io.study import load
from analysis.report.build import html
from analysis.report.findings import Findings
from tests.analysis.helpers import simulate

HEADING = "What the models write"


def written(folder, rows, **more):
    """Write a simulated study with a table of samples: (arm, prompt, greedy)."""
    simulate(folder)
    same = {"beginning": "I <b> &", "text": "am", "sampled": "so\n\n<script>alert(1)</script>", **more}
    rows = [{"arm": arm, "prompt": prompt, "greedy": greedy, **same} for arm, prompt, greedy in rows]
    pd.DataFrame(rows).to_parquet(folder / "samples.parquet", index=False)
    return folder


def page_of(folder):
    """Return the report of a study without its figures."""
    return html(Findings(load(folder)), {}, {})


def test_the_baseline_comes_first_and_an_arm_without_a_model_is_left_out(tmp_path):
    rows = [("paglu-searched", 1, "d"), ("paglu-searched", 0, "b"), ("linear-floor", 0, "c"), ("gelu", 0, "a")]
    first, second = by_prompt(load(written(tmp_path, rows)))
    assert [(each.arm, each.greedy) for each in first.arms] == [
        *(("gelu", "a"), ("linear-floor", "c"), ("paglu-searched", "b"))
    ]
    assert second.arms == [Continued("paglu-searched", "d", "so\n\n<script>alert(1)</script>")]
    assert (first.beginning, first.text) == ("I <b> &", "am")


def test_the_page_escapes_what_a_model_writes_and_shows_what_cannot_be_seen(tmp_path):
    page = page_of(written(tmp_path, [("gelu", 0, "a   b\ufffd"), ("paglu-searched", 0, '" onclick="')]))
    assert HEADING in page
    assert "<b>…I &lt;b&gt; &amp;</b>" in page
    assert "<p>so↵↵&lt;script&gt;alert(1)&lt;/script&gt;</p>" in page
    assert "<p>a␣␣ b\ufffd</p>" in page
    assert "&#34; onclick=&#34;" in page
    assert "<script" not in page
    (tmp_path / "samples.parquet").unlink()  # as in a study of an older version
    assert HEADING not in page_of(tmp_path)


def test_a_wrong_table_is_refused(tmp_path):
    with pytest.raises(TableError, match=r"samples.parquet: column arm has 'other'; allowed: gelu, "):
        by_prompt(load(written(tmp_path, [("other", 0, "a")])))
    table = pd.read_parquet(tmp_path / "samples.parquet").drop(columns="text")
    table.to_parquet(tmp_path / "samples.parquet", index=False)
    with pytest.raises(TableError, match=r"samples.parquet: column text is missing; it has arm, prompt"):
        by_prompt(load(tmp_path))
