"""Check that every published page follows from its Parquet files, and that nothing in them names a machine."""

import importlib.util
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from analysis.describe import curves, growth
from analysis.io.files import TableError
from analysis.io.study import load
from analysis.published import freeze, index
from analysis.published.page import OPTIONAL
from tune.study.files import load as load_study
from tune.study.files import parse

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "results"
_spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs" / "make_results.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)
FOLDERS = make.published(RESULTS)
TABLES = ("study.yaml", "provenance.json", "trials.parquet", "curves.parquet")
every_published_study = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def numbers_only(folder: Path, to: Path) -> Path:
    """Copy the files that a published page is made from."""
    to.mkdir()
    for name in (*TABLES, *(name for name in OPTIONAL if (folder / name).exists())):
        shutil.copy(folder / name, to / name)
    return to


def close(a: object, b: object) -> bool:
    """Return whether two objects are equal, numbers to a relative 1e-9: sums differ between versions of numpy."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, float) and isinstance(b, float | int):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return a == b


def test_something_is_published():
    assert FOLDERS


@every_published_study
def test_a_page_is_what_its_tables_say(folder: Path, tmp_path: Path):
    copy = numbers_only(folder, tmp_path / folder.name)
    make.write_page(copy, draw_figures=False)
    assert (copy / "README.md").read_text() == (folder / "README.md").read_text(), "stale: python docs/make_results.py"
    result, stored = (json.loads((place / "verdict.json").read_text()) for place in (copy, folder))
    assert close(result, stored)


@pytest.mark.parametrize("folder", FOLDERS[:1], ids=lambda folder: folder.name)
@pytest.mark.parametrize("table", ["trials", "curves"])
def test_a_changed_value_changes_the_page(folder: Path, table: str, tmp_path: Path):
    copy = numbers_only(folder, tmp_path / folder.name)
    rows = pd.read_parquet(copy / f"{table}.parquet")
    arm = next(row["arm"] for row in json.loads((folder / "verdict.json").read_text())["comparisons"])
    of_arm = (rows["stage"] == "confirm") & (rows["arm"] == arm)
    column = "test_nll" if table == "trials" else "val_nll"
    rows.loc[rows[of_arm].index[-1], column] += 0.05
    rows.to_parquet(copy / f"{table}.parquet")
    make.write_page(copy, draw_figures=False)
    assert (copy / "README.md").read_text() != (folder / "README.md").read_text()


@every_published_study
def test_the_decision_is_the_one_that_scipy_computes_from_the_table(folder: Path):
    trials = pd.read_parquet(folder / "trials.parquet").query("stage == 'confirm' and outcome == 'completed'")
    if "rung" in trials.columns:  # the decision of a ladder's page is that of its largest size
        trials = trials[trials["rung"] == trials["rung"].max()]
    losses = trials.pivot(index="seed", columns="arm", values="test_nll")
    page = (folder / "README.md").read_text()
    verdict = json.loads((folder / "verdict.json").read_text())
    for row in verdict["comparisons"]:
        both = losses[[verdict["baseline"], row["arm"]]].dropna()
        base, arm = both.to_numpy().T
        improvement = 100 * (1 - arm.mean() / base.mean())
        assert row["improvement_percent"] == pytest.approx(improvement, rel=1e-9)
        assert row["p_t"] == pytest.approx(stats.ttest_rel(base, arm).pvalue, rel=1e-9)
        assert f"| {row['arm']} | {len(both)} | {improvement:+.3f} |" in page
        for end in ("improvement_low", "improvement_high"):  # Fieller: the t test of arm - (1 - r) base does not reject
            shifted = arm - (1 - row[end] / 100) * base
            at_look = row["path"][-1]["stops_at"] if row["path"] else verdict["level"]
            assert stats.ttest_1samp(shifted, 0.0).pvalue == pytest.approx(at_look, rel=1e-6)


@every_published_study
def test_a_published_study_can_be_read_and_names_no_machine(folder: Path):
    study = load_study(folder / "study.yaml")
    assert (study.tracking, study.address, study.storage) == (None, None, None)
    came = json.loads((folder / "provenance.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{40}", came["git_commit"])
    assert re.fullmatch(r"[0-9a-f]{16}", came["corpus_digest"])
    assert came["source"]
    if study.corpus.files:
        parts = (study.corpus.files.train, study.corpus.files.validation, study.corpus.files.test)
        named = {path for part in parts for path in ([part] if isinstance(part, str) else part or [])}
        assert set(came["files_sha256"]) == named
    text = "".join(
        (folder / name).read_text() for name in ("study.yaml", "provenance.json", "README.md", "verdict.json")
    )
    assert make.ABSOLUTE.findall(re.sub(r"https://\S+", "", text)) == []
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 1_000_000


@every_published_study
def test_every_figure_is_a_whole_svg_that_the_page_shows(folder: Path):
    shown = set(re.findall(r"\]\(figures/(\w+)\.svg\)", (folder / "README.md").read_text()))
    assert shown == {file.stem for file in (folder / "figures").glob("*.svg")}
    for file in (folder / "figures").glob("*.svg"):
        assert ElementTree.parse(file).getroot().tag.endswith("svg")


def test_the_front_pages_are_what_the_studies_say():
    studies = [load(folder) for folder in FOLDERS]  # once: each study is decided once
    for name, text in index.texts(studies, RESULTS).items():
        assert (RESULTS / name).read_text() == text, f"{name} is stale: python docs/make_results.py"
    block = (ROOT / "README.md").read_text().split(make.README_MARKS[0])[1].split(make.README_MARKS[1])[0]
    assert block == f"\n{index.readme_block(studies)}\n"


def test_the_front_page_says_what_no_published_study_has():
    study = load(RESULTS / "quick-builtin")
    (said, _) = index._lacking([study])
    assert "has the arm `swiglu`" in said
    assert "`layers.parquet`" in said
    assert index._lacking([load(folder) for folder in FOLDERS])[0] in (RESULTS / "README.md").read_text()
    arms = study.settings["arms"] | {"swiglu": {"unit": "swiglu"}}
    newer = replace(study, settings=study.settings | {"arms": arms}, layers=pd.DataFrame({"layer": [0]}))
    assert index._lacking([study, newer]) == index._lacking([]) == []


def test_the_command_of_the_front_page_is_one_that_freeze_takes():
    words = re.search(r"^pagating freeze (.+) > new\.yaml$", (RESULTS / "README.md").read_text(), re.M)[1]
    options = freeze.parser("freeze").parse_args(words.split())
    study = load(ROOT / options.source)
    assert len(freeze.pattern(study, options.arm)) == study.settings["model"]["n_layer"]
    with pytest.raises(SystemExit) as stopped:
        freeze.parser("freeze").parse_args([*words.split(), "--clip"])
    assert stopped.value.code == 2


def finished(demo: Path, text: Path) -> Path:
    """Add to a simulated study the other files of a run: a corpus, provenance, a ledger, a verdict."""
    settings = yaml.safe_load((demo / "study.yaml").read_text())
    settings |= {"corpus": {"files": {"train": [str(text)]}}, "tracking": "sqlite:////home/somebody/mlflow.db"}
    (demo / "study.yaml").write_text(yaml.safe_dump(settings))
    came = {"corpus_digest": "0123456789abcdef", "git_commit": "0" * 40, "python": "3.11.7", "slots": 2}
    (demo / "provenance.json").write_text(json.dumps(came))
    (demo / "ledger.jsonl").write_text('{"event": "study", "time": 100.0}\n{"event": "ended", "time": 160.4}\n')
    (demo / "verdict.json").write_text("{}")
    return demo


def test_publishing_leaves_the_machine_out(demo: Path, tmp_path: Path):
    text = tmp_path / "corpora" / "novel" / "train.txt"
    text.parent.mkdir(parents=True)
    text.write_bytes(b"abc")
    out = tmp_path / "results" / "demo"
    make.publish(finished(demo, text), out, source="a novel, https://example.org/novel", note=None)
    settings = yaml.safe_load((out / "study.yaml").read_text())
    assert settings["corpus"] == {"files": {"train": ["novel/train.txt"]}}
    assert "tracking" not in settings
    came = json.loads((out / "provenance.json").read_text())
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of abc, FIPS 180-2
    assert came["files_sha256"] == {"novel/train.txt": sha256}
    assert came["wall_seconds"] == 60
    make.write_all(tmp_path / "results")
    page = (out / "README.md").read_text()
    assert set(re.findall(r"\]\(figures/(\w+)\.svg\)", page)) == {f.stem for f in (out / "figures").glob("*.svg")}
    assert str(tmp_path) not in page
    assert sha256 in page
    assert "a novel, https://example.org/novel" in page
    pd.testing.assert_frame_equal(pd.read_parquet(out / "trials.parquet"), pd.read_parquet(demo / "trials.parquet"))
    front = (tmp_path / "results" / "README.md").read_text()
    assert "## Side by side" in front
    assert "[demo](demo/README.md)" in front


def test_publishing_refuses_what_speaks_of_the_machine(demo: Path, tmp_path: Path):
    text = tmp_path / "train.txt"
    text.write_bytes(b"abc")
    finished(demo, text)
    trials = pd.read_parquet(demo / "trials.parquet")
    trials.loc[0, "reason"] = "OSError: /srv/somebody/tokens.bin is missing"
    trials.to_parquet(demo / "trials.parquet")
    with pytest.raises(make.PublishError, match=r"column reason: has the path '/srv/somebody/tokens.bin'"):
        make.publish(demo, tmp_path / "out")
    with pytest.raises(make.PublishError, match=r"speaks of this machine|has the path"):
        make.publish(demo, tmp_path / "out", command=f"pagating sweep {tmp_path}/study.yaml")
    (demo / "verdict.json").unlink()
    with pytest.raises(make.PublishError, match=r"has no verdict.json; allowed: a finished study"):
        make.publish(demo, tmp_path / "out")


def exact(demo: Path, percent) -> None:
    """Write curves of confirm runs whose improvement at `tokens` is `percent(noise of the seed, tokens)`."""
    rows = [
        ("confirm", arm, seed, "k", t, 2.0 if arm == "gelu" else 2 * (1 - percent(noise, t) / 100), t)
        for seed, noise in ((100, 0.1), (101, -0.1), (102, 0.3))
        for t in (1_000_000, 2_000_000, 3_000_000, 5_000_000)
        for arm in ("gelu", "paglu-searched")
    ]
    names = ["stage", "arm", "seed", "config_key", "step", "val_nll", "tokens"]
    pd.DataFrame(rows, columns=names).to_parquet(demo / "curves.parquet")
    pd.read_parquet(demo / "trials.parquet").assign(config_key="k").to_parquet(demo / "trials.parquet")


def test_growth_on_both_scales_is_the_slope_that_was_put_in(demo: Path):
    exact(demo, lambda noise, t: (0.5 + noise) * t / 1e6)
    log2, linear = growth.table(load(demo))
    assert (linear["scale"], linear["n"], linear["up"]) == ("% per million tokens", 3, 3)
    assert linear["slope"] == pytest.approx(0.6)
    test = stats.ttest_1samp([0.6, 0.4, 0.8], 0.0)
    assert linear["p"] == linear["p_adjusted"] == pytest.approx(test.pvalue)
    assert (linear["low"], linear["high"]) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert linear["verdict"] == "rises with tokens"
    x = np.log2([1, 2, 3, 5])
    assert log2["slope"] == pytest.approx(0.6 * np.polyfit(x, [1, 2, 3, 5], 1)[0])
    assert list(linear["values"]) == ["100", "101", "102"]
    assert growth.main(["--study", str(demo)]) == 0


def test_growth_corrects_for_the_number_of_arms_and_needs_a_spread(demo: Path):
    rows = [row for row in growth.table(load(demo)) if row["scale"] == curves.SCALES["log2"][1]]
    raw = sorted(row["p"] for row in rows)
    holm = np.maximum.accumulate([min(1.0, p * (len(raw) - i)) for i, p in enumerate(raw)])
    assert sorted(row["p_adjusted"] for row in rows) == pytest.approx(list(holm))
    exact(demo, lambda noise, t: 0.5 * np.log2(t))
    row = growth.table(load(demo))[0]
    assert (row["p"], row["p_adjusted"], row["slope"]) == (None, None, pytest.approx(0.5))
    assert row["verdict"] == "not testable (n=3, or no spread between seeds)"


def test_growth_without_curves_has_nothing_to_show(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "x.csv"
    file.write_text("arm,seed,loss\na,1,3.0\nb,1,3.1\n")
    assert growth.main([str(file), "--baseline", "a"]) == 0
    assert "no curves of confirm runs" in capsys.readouterr().err
    with pytest.raises(TableError, match="two sources"):
        growth.main([str(file), "--study", str(file)])


def test_the_frozen_pattern_is_the_mean_over_seeds_and_its_study_has_fresh_ones(
    demo: Path, capsys: pytest.CaptureFixture
):
    settings = yaml.safe_load((demo / "study.yaml").read_text())
    settings["fixed"] = {"tokens": 400_000, "batch_tokens": 2048}
    (demo / "study.yaml").write_text(yaml.safe_dump(settings))
    assert freeze.main([str(demo), "--arm", "paglu-per-layer"]) == 0
    study = parse(capsys.readouterr().out, Path("follow-up.yaml"))
    runs = pd.read_parquet(demo / "trials.parquet").query("stage == 'confirm' and arm == 'paglu-per-layer'")
    learned = runs[[f"alpha_layer_{i}" for i in range(4)]].mean().tolist()
    assert study.arms["paglu-per-layer-frozen"].alpha == pytest.approx(learned, abs=5e-5)
    assert list(study.arms) == ["gelu", "linear-floor", "paglu-per-layer", "paglu-per-layer-frozen"]
    assert study.arms["linear-floor"].floor
    assert study.confirm.first_seed == runs["seed"].max() + 1
    assert study.confirm.seeds == 8
    low, high = study.nuisance["lr"].values
    assert low < 2e-3 < high  # the rate that all arms of the simulated study confirmed
    assert study.name == "demo-frozen"
    assert freeze.follow_up(load(demo), "paglu-per-layer", seeds=12)["confirm"]["seeds"] == 12


def test_the_follow_up_of_a_replicate_is_a_replicate_whose_seeds_begin_after_its_own(demo: Path):
    study = load(demo)
    wanted = freeze.follow_up(study, "paglu-per-layer")["confirm"]["first_seed"]
    study.settings["replicate"] = 4
    study.trials["seed"] += 40_000_000
    settings = freeze.follow_up(study, "paglu-per-layer")
    assert (settings["replicate"], settings["confirm"]["first_seed"]) == (4, wanted)


def test_a_pattern_that_cannot_be_frozen_is_refused(demo: Path):
    study = load(demo)
    with pytest.raises(TableError, match=r"--arm paglu-searched: learned no alpha; allowed: paglu-per-layer"):
        freeze.follow_up(study, "paglu-searched")
    with pytest.raises(TableError, match=r"--arm nobody: is not an arm of demo"):
        freeze.follow_up(study, "nobody")
    study.trials["alpha_layer_3"] += 9.2
    with pytest.raises(TableError, match=r"alpha of layer 3 is 10\.\d+; allowed: in \[-10, 10\]"):
        freeze.pattern(study, "paglu-per-layer")
    study.trials["alpha_layer_3"] -= 13.2  # a negative one is a pattern like any other
    pattern = freeze.pattern(study, "paglu-per-layer")
    assert pattern[3] < 0
    follow_up = parse(yaml.safe_dump(freeze.follow_up(study, "paglu-per-layer")), Path("x.yaml"))
    assert follow_up.arms["paglu-per-layer-frozen"].alpha == pattern
