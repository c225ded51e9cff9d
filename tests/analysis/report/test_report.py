"""Check that the report is self-contained, escaped and deterministic, with the numbers of verdict.json."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml

from analysis.io import formats
from analysis.io.files import TableError
from analysis.io.study import load
from analysis.io.text import percent
from analysis.report import build, plots
from analysis.report.findings import Findings
from analysis.verdict import decide
from tests.analysis.helpers import simulate


class Page(HTMLParser):
    """Collector of tags, ids and references."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.ids, self.references, self.stack = [], [], [], []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append(tag)
        self.ids += [named["id"]] if "id" in named else []
        self.references += [v for k, v in named.items() if k in ("src", "href", "xlink:href", "data")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study folder with its report, to be read only."""
    folder = simulate(tmp_path_factory.mktemp("built") / "demo")
    assert build.build(folder) == folder / "report.html"
    return folder


def test_the_folder_gets_verdict_figures_and_report(built: Path):
    demo = built
    result = json.loads((demo / "verdict.json").read_text())
    assert result == json.loads(json.dumps(decide.verdict(load(demo))))
    names = {p.stem for p in (demo / "figures").glob("*.svg")}
    assert names == {"differences", "learning_rate", "loss_curves", "over_training", "alphas", "search_budget"}
    for svg in (demo / "figures").glob("*.svg"):
        assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert result["summary"] in (demo / "verdict.md").read_text()
    words = {r["arm"]: r["verdict"] for r in result["comparisons"]}
    assert words["linear-floor"] == "worse"
    assert words["paglu-searched"] == "better"  # a true gap of 0.6% with noise of 0.17%
    assert not list(demo.glob("**/.*"))
    assert {p.stem for p in (demo / "figures").glob("*.pdf")} == names
    assert all(p.read_bytes().startswith(b"%PDF") for p in (demo / "figures").glob("*.pdf"))
    table = pd.read_csv(demo / "tables" / "verdict.csv")
    assert table["p_adjusted"].tolist() == [r["p_adjusted"] for r in result["comparisons"]]
    assert r"\toprule" in (demo / "tables" / "fairness.tex").read_text()


def test_the_report_is_self_contained_and_ids_are_unique(built: Path):
    text = (built / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.tags.count("svg") == 6
    assert "script" not in page.tags
    assert [r for r in page.references if not r.startswith("#")] == []
    assert not re.search(r"url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    inner = {r[1:] for r in page.references} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert inner <= set(page.ids)


def test_figures_fit_a_phone_and_every_table_scrolls_by_itself(built: Path):
    text = (built / "report.html").read_text()
    assert text.count("<table>") == len(re.findall(r'<div class="scroll w\d+"><table>', text)) > 3
    widths = [float(w) for w in re.findall(r'viewBox="0 0 ([\d.]+) ', text)]
    assert len(widths) == 6
    # 10 pt text in a figure of this width, scaled to the 358 px that a phone of 390 px has for it
    assert all(10 * 358 / width > 7.5 for width in widths)


def test_the_baseline_and_the_first_arms_differ_in_shape_as_well(built: Path):
    study = load(built)
    markers = [plots.arm_style(study, arm)[1] for arm in study.arms]
    assert len(set(markers)) == len(markers)
    assert len(set(plots.MARKERS)) == len(plots.MARKERS) >= 10
    assert "o" not in plots.MARKERS  # the baseline's own


def test_the_same_tables_give_the_same_bytes(built: Path, demo: Path):
    build.build(demo)
    names = [p.relative_to(built) for p in built.glob("**/*") if p.is_file() and p.suffix != ".parquet"]
    assert len(names) > 20
    assert [n for n in names if (demo / n).read_bytes() != (built / n).read_bytes()] == []


def test_numbers_of_a_logarithmic_axis_have_one_form():
    shown = [plots.power_text(x, None) for x in (5e-4, 0.2, 1.0, 2.0, 30.0, 1e12)]
    assert shown == ["5e-4", "2e-1", "1", "2", "3e1", "1e12"]


def test_a_table_that_does_not_fit_has_a_card_per_row():
    columns = {"arm": ("arm", ""), "loss": ("loss", ".4f"), "why": ("why", "")}
    rows = [{"arm": "gelu", "loss": 3.1234, "why": "of a text that is longer than any line of it would be"}]
    # 4, 6 and 24 characters of 0.48 rem, and three columns of 0.9 rem
    assert build.widest(rows, columns) == 20
    assert build.widest(rows, {str(n): ("heading", "") for n in range(8)}) == 38
    assert build.widest([{"arm": "x" * 2000}], {"arm": ("arm", ".1f")}) == build.WIDTHS[-1]


def test_the_arms_have_their_formulas_and_ends_of_intervals_their_owner(demo: Path):
    facts = {"formulas": {"gelu": "the stock activation", "linear-floor": "x", "paglu-searched": "alpha * x"}}
    (demo / "provenance.json").write_text(json.dumps(facts))
    page = build.html(Findings(load(demo)), {}, {})
    table = page[page.index("The arms</h2>") :]
    table = table[: table.index("</table>")]
    for cells in (("gelu", "baseline", "the stock activation"), ("paglu-searched", "-", "alpha * x")):
        row = next(row for row in table.split("<tr>") if f">{cells[0]}</td>" in row)
        assert all(f">{cell}</td>" in row for cell in cells)
    assert 'data-of="improvement %, low"' in page
    assert 'data-of="low"' not in page
    assert "98.3333" not in page
    assert (percent(0.95), percent(1 - 0.05 / 3), percent(0.002)) == ("95%", "98.3%", "0.2%")


def test_several_studies_have_a_page_with_the_verdict_of_each(built: Path, tmp_path: Path):
    one, other = Findings(load(built)), Findings(load(simulate(tmp_path / "a b<", seeds=4)))
    page = tmp_path / "all.html"
    assert build.several({built / "report.html": one, tmp_path / "a b<" / "report.html": other}, page) == page
    text = page.read_text()
    seen = Page()
    seen.feed(text)
    assert "a%20b%3C/report.html" in seen.references
    assert seen.references[:2] == ["#part-1", "#part-2"]
    for found in (one, other):
        for row in found.result.every:
            assert f"{row.improvement_percent:+.3f}" in text
    assert text.count('<div class="verdict">') == 2
    assert text.count("Preliminary") >= 1  # four seeds are too few for a claim


def test_the_run_is_told_from_the_provenance(demo: Path):
    assert "The run</h2>" not in build.build(demo).read_text()
    known = {"begun": "2026-11-27 20:05 UTC", "trial_seconds": 7300.0, "machine": "Linux <x>, 2 cores", "slots": 1}
    (demo / "provenance.json").write_text(json.dumps(known | {"versions": {"torch": "2.13.0"}}))
    text = build.build(demo).read_text()
    assert "<dt>begun</dt><dd>2026-11-27 20:05 UTC</dd><dt>training</dt><dd>2.0 h in all trials</dd>" in text
    assert "<dd>Linux &lt;x&gt;, 2 cores, 1 trial at a time</dd>" in text
    assert "torch 2.13.0" in text


def test_every_name_is_escaped(tmp_path: Path):
    evil = "<script>alert(1)</script> $a_b$"
    arms = {"_gelu": {"baseline": True}, evil: {"note": "<img src=x>"}}
    folder = simulate(tmp_path / "evil", arms=arms, gaps={"_gelu": 0.0, evil: 0.1})
    settings = yaml.safe_load((folder / "study.yaml").read_text())
    (folder / "study.yaml").write_text(yaml.safe_dump(settings | {"question": "<b>?</b>", "name": "<i>"}))
    text = build.build(folder).read_text()
    page = Page()
    page.feed(text)
    assert not {"script", "img", "b", "i"} & set(page.tags)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $a_b$" in text
    assert "no floor arm is declared" in text
    assert "_gelu" in (folder / "figures" / "loss_curves.svg").read_text()  # not hidden from the legend


def test_a_study_without_confirm_runs_still_gets_a_report(demo: Path):
    trials = pd.read_parquet(demo / "trials.parquet")
    trials[trials["stage"] != "confirm"].to_parquet(demo / "trials.parquet")
    (demo / "curves.parquet").unlink()
    build.build(demo)
    result = json.loads((demo / "verdict.json").read_text())
    assert {r["verdict"] for r in result["comparisons"]} == {"unfinished"}
    assert result["summary"].startswith("Unfinished: 0 of 32 confirm trials.")


def test_what_would_change_the_conclusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plots, "render", lambda *given, **options: b"<svg></svg>")  # only the text is tested
    gaps = {"gelu": 0.0, "linear-floor": 0.05, "paglu-searched": 0.0, "paglu-per-layer": 0.0}
    text = build.build(simulate(tmp_path / "few", gaps=gaps, seeds=4)).read_text()
    assert "a claim asks for 8" in text
    assert "below a gap of 3%" in text
    assert "This interval is of the floor alone, at level 0.05" in text
    assert re.search(r"\d+ of \d+ trials infeasible", text)


def test_the_terminal_table_has_a_row_an_arm(demo: Path):
    table = build.terminal_table(decide.decide(load(demo)))
    assert table.row_count == 3
    assert [str(c.header) for c in table.columns][-1] == "verdict"
    gone = {"arm": "x", "n": 0, "verdict": "unfinished", "p_adjusted": None}
    gone |= dict.fromkeys(("improvement_percent", "improvement_low", "improvement_high"))
    assert [str(shown) for shown in formats.verdict_table([gone], "", 80).columns[2].cells] == ["-"]


@pytest.mark.slow
def test_a_table_of_100_000_trials_stays_below_2_gb(demo: Path):
    seeds = np.repeat(np.arange(1000, 26_000), 4)
    trials = pd.read_parquet(demo / "trials.parquet")
    one = trials[trials["stage"] == "confirm"]
    noise = np.random.default_rng(0).normal(0, 0.01, len(seeds))
    big = one.iloc[np.resize(np.arange(4) * 8, len(seeds))].assign(seed=seeds)
    big = big.assign(test_nll=big["test_nll"].to_numpy() + noise, config_key="k")
    big.to_parquet(demo / "trials.parquet")
    code = f"import resource; from analysis.report import build; build.build({str(demo)!r}); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2_000_000  # KiB
    result = json.loads((demo / "verdict.json").read_text())
    assert [r["n"] for r in result["comparisons"]] == [25_000] * 3


def test_a_study_in_which_things_went_wrong_still_reports(demo: Path):
    trials = pd.read_parquet(demo / "trials.parquet")
    confirm = trials["stage"] == "confirm"
    trials.loc[confirm & (trials["arm"] == "paglu-searched"), ["outcome", "test_nll", "val_nll"]] = (
        "infeasible", np.nan, np.nan,
    )  # fmt: skip
    trials.loc[confirm & (trials["arm"] == "paglu-per-layer"), "outcome"] = "failed"  # by the machine
    trials.to_parquet(demo / "trials.parquet")
    text = build.build(demo).read_text()
    words = {r["arm"]: r for r in json.loads((demo / "verdict.json").read_text())["comparisons"]}
    assert words["paglu-searched"]["verdict"] == "worse"
    assert words["paglu-searched"]["improvement_percent"] is None
    assert words["paglu-per-layer"]["verdict"] == "not testable (no treatment runs)"
    assert "paglu-searched diverged on seeds 100, 101" in text


def test_losses_below_zero_have_no_percentage(demo: Path):
    trials = pd.read_parquet(demo / "trials.parquet")
    trials["test_nll"] -= 10
    trials.to_parquet(demo / "trials.parquet")
    with pytest.raises(TableError, match=r"margin '0.5%' of a mean of -6.6\d*; allowed: a number in nats"):
        build.build(demo)
    settings = yaml.safe_load((demo / "study.yaml").read_text())
    settings["confirm"]["margin"] = 0.02
    (demo / "study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    build.build(demo)
    row = json.loads((demo / "verdict.json").read_text())["comparisons"][1]
    assert row["improvement_percent"] is row["improvement_low"] is row["mde_percent"] is None
    assert row["mean_difference"] == pytest.approx(0.02, abs=0.01)
