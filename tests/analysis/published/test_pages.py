"""Check a published page apart from its tables: captions, costs, colours, and how to run the study again."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml

from analysis.io.names import RUNGS_APART
from analysis.io.study import load
from analysis.published import claims_ours, freeze, index
from analysis.published import page as results_page
from analysis.report import differences, plots
from analysis.report.figures import FIGURES, drawn
from analysis.report.findings import Findings
from analysis.verdict.decide import verdict
from pagating.data.texts import matching_files
from tests.analysis.helpers import climb
from tune.study.files import load as load_study

RESULTS = Path(__file__).parents[3] / "docs" / "results"


def page_of(folder: Path, **came: object) -> str:
    """Return the page of a study with this provenance."""
    (folder / "provenance.json").write_text(json.dumps(came))
    (folder / "verdict.json").write_text("{}")  # the page names its size
    found = Findings(load(folder))
    return results_page.page(found, drawn(found, published=True))


def test_speeds_that_are_no_measurements_name_no_slow_arm(demo: Path):
    trials = pd.read_parquet(demo / "trials.parquet")
    trials.loc[trials["arm"] == "paglu-per-layer", "tokens_per_second"] = 10_000.0
    trials.to_parquet(demo / "trials.parquet")
    assert "Slower than the baseline, at equal tokens: paglu-per-layer (0.50)" in page_of(demo)
    assert "Slower than the baseline" in page_of(demo, note="On an idle machine.")
    note = "Other programs shared the machine, so that seconds and speeds are no measurements."
    page = page_of(demo, note=note)
    assert note in page
    assert "Slower than the baseline" not in page


def test_a_caption_says_what_is_shown_before_how_to_read_it(demo: Path):
    page = page_of(demo)
    said = {name: figure.takeaway for name, figure in drawn(Findings(load(demo))).items()}
    short = {row.name: row.short for row in FIGURES}
    for name in ("differences", "loss_curves", "over_training", "alphas", "learning_rate"):
        caption = page.split(f"](figures/{name}.svg)\n\n")[1].split("\n")[0]
        assert caption.replace("\\", "").startswith(f"**{said[name]}** {short[name]}")
    assert re.search(r"to the highest\. \d+ points lie above the frame\.", page)


def test_a_page_says_why_if_models_were_kept(demo: Path):
    assert "## Why" not in page_of(demo)
    rows = [
        {
            "arm": arm,
            "seed": 101,
            "layer": layer,
            "openness": 0.5,
            "gradient_norm": 0.1 + 0.1 * layer,
            "hidden_rank": rank,
        }
        for arm, rank in (("gelu", 40.0), ("paglu-per-layer", 20.0))
        for layer in (0, 1)
    ]
    pd.DataFrame(rows).to_parquet(demo / "layers.parquet", index=False)
    why = page_of(demo).split("## Why\n")[1].split("\n## ")[0]
    assert "| paglu-per-layer | 101 | 2 | 0.500 |" in why
    assert "](figures/layers.svg)" in why
    assert "smaller for paglu-per-layer (0.50 times)" in why.replace("\\", "")
    assert "[layers.parquet](layers.parquet)" in page_of(demo)


def test_the_command_of_a_page_is_its_own_study_file(demo: Path):
    page = page_of(demo, command="pagating sweep somewhere-else.yaml", source="made up")
    assert "| command | `pagating sweep docs/results/demo/study.yaml` |" in page
    assert "somewhere-else" not in page
    assert "put beside study.yaml" not in page  # the built-in corpus needs no file
    assert "not the same bits" not in page
    settings = yaml.safe_load((demo / "study.yaml").read_text())
    settings["corpus"] = {"files": {"train": ["novel/a.txt", "novel/b.txt"], "test": "novel/test.txt"}}
    (demo / "study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    page = page_of(demo, source="a novel, https://example.org/novel")
    assert "| put beside study.yaml first | `novel/a.txt`, `novel/b.txt`, `novel/test.txt` |" in page
    assert page.count("gives the same question, not the same bits") == 1


@pytest.mark.parametrize("name", ["laptop-wikitext-2", "quick-wikitext-2"])
def test_a_published_study_file_loads_and_finds_its_text_beside_it(name: str, tmp_path: Path):
    shutil.copy(RESULTS / name / "study.yaml", tmp_path / "study.yaml")
    study = load_study(tmp_path / "study.yaml")
    assert study.name == name
    page = (RESULTS / name / "README.md").read_text()
    assert f"`pagating sweep docs/results/{name}/study.yaml`" in page
    named = re.findall(r"`([^`]+)`", re.search(r"\| put beside study\.yaml first \| (.+) \|", page)[1])
    for file in named:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("some text\n")
    files = study.corpus.files
    for patterns in (files.train, files.validation, files.test):
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            assert matching_files(tmp_path, pattern) == [str(tmp_path / pattern)]


def test_a_colour_is_of_one_arm_in_all_panels(demo: Path, monkeypatch: pytest.MonkeyPatch):
    one = load(demo)
    arms = ["paglu-per-layer", "gelu", "linear-floor"]  # another order, and one arm fewer
    two = replace(one, name="two", arms=arms, trials=one.trials[one.trials["arm"].isin(arms)])
    drawn: list[dict[str, tuple[str, str]]] = []
    monkeypatch.setattr(
        differences,
        "draw_differences",
        lambda ax, study, rows: drawn.append({row.arm: plots.arm_style(study, row.arm) for row in rows}),
    )
    index.side_by_side([one, two])
    first, second = drawn
    assert second.keys() < first.keys()
    assert all(first[arm] == style for arm, style in second.items())
    assert len(set(first.values())) == 3
    assert plots.arm_style(two, "paglu-per-layer") != first["paglu-per-layer"]  # the colour by its place in this study


def test_the_front_page_has_the_claim_in_words_and_an_answer_for_each_arm(demo: Path, tmp_path: Path):
    study = load(demo)
    front = index.front_page([study], tmp_path)
    assert "**Claimed**: alpha = 0.5 is 1.9% better than the baseline at 20,000 steps (1 seed per cell" in front
    assert "against their own best baseline: -11.878% (eval)" in front
    of = {row["arm"]: row for row in verdict(study)["comparisons"]}
    for arm in ("paglu-searched", "paglu-per-layer"):
        assert f"- {arm} (demo), over gelu: {of[arm]['improvement_percent']:+.2f}% " in front
    assert "- linear-floor" not in front
    assert "None of these studies has an arm of fixed alpha 0.5" in front


def test_the_readme_has_one_row_per_arm_and_one_column_per_study_with_enough_seeds():
    few, enough = load(RESULTS / "quick-wikitext-2"), load(RESULTS / "laptop-wikitext-2")
    rows = [line for line in index.readme_block([few, enough]).splitlines() if line.startswith("|")]
    assert rows[0] == "| arm | laptop-wikitext-2 |"  # six seeds are too few for a claim
    of = {row["arm"]: row for row in verdict(enough)["comparisons"]}
    assert len(rows) == 2 + len(of)
    for line in rows[2:]:
        arm, said = line.strip("| ").split(" | ")
        assert said.startswith(f"{of[arm]['verdict']}: {of[arm]['improvement_percent']:+.2f}% [")
    assert "| arm | quick-wikitext-2 |" in index.readme_block([few])  # shown if there is no other study


@pytest.mark.parametrize(
    ("options", "is_published"),
    [
        ({"gate": "sigmoid", "alpha": 0.5}, True),
        ({"gate": "sigmoid", "alpha": 0.5, "base": "identity", "form": "pointwise"}, True),
        ({"gate": "sigmoid", "alpha": 0.5, "base": "gelu"}, False),
        ({"gate": "tanh", "alpha": 0.5}, False),
        ({"gate": "sigmoid", "alpha": 0.5, "form": "glu"}, False),
        ({"unit": "silu"}, False),
    ],
)
def test_the_published_formula_is_known_by_gate_base_and_form(options: dict, is_published: bool):
    assert index.published_formula(options) is is_published


def test_the_page_of_a_ladder_has_its_trends_and_every_rung(tmp_path: Path):
    folder = climb(tmp_path / "climb", {"steady": (1.0, 1.0, 1.0), "up": (0.3, 1.0, 2.0)})
    page = page_of(folder)
    headings = (
        "## Does it last?",
        *(f"## The decision on rung {rung}\n" for rung in (1, 2, 3)),
        "this page is about rung 3",
    )
    places = [page.index(text) for text in headings]
    assert places == sorted(places)
    assert "![ladder](figures/ladder.svg)" in page
    assert "- steady: holds on 3 rungs: better on each" in page
    floor = claims_ours.said(load(folder))["improvement"]  # the floor as baseline, on the highest rung
    assert "better" in floor[0]["over linear-floor, the published baseline"]


def test_a_follow_up_of_a_rung_is_a_study_of_one_size_with_the_whole_level(tmp_path: Path):
    folder = climb(tmp_path / "climb", {"steady": (1.0,) * 3})
    file = folder / "study.yaml"
    file.write_text(file.read_text().replace("unit: relu2", "gate: sigmoid"))
    trials = pd.read_parquet(folder / "trials.parquet")
    trials["seed"] = trials["seed"] % 1000 + 101 + RUNGS_APART * (trials["rung"] - 1)
    trials.assign(alpha_layer_0=0.4, alpha_layer_1=0.6).to_parquet(folder / "trials.parquet")
    found = freeze.follow_up(load(folder), "steady", None)
    assert found["model"]["d_model"] == 128
    assert "scales" not in found
    assert (found["confirm"]["level"], found["confirm"]["first_seed"]) == (pytest.approx(0.05), 109)
