import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from analysis.report import palette
from tests.tune.decide.ladders import ladder_of
from tune.study.files import load, parse
from tune.tracking.verdict import _fitting, headline, note
from tune.tracking.views import (
    ARM_COLOURS,
    OPENS,
    VIEW,
    VIEWS,
    arm_colour,
    end_of_curves,
    is_ours,
    state,
    view_link,
    view_tags,
    views_of,
)

CONFIGS = Path(__file__).parents[3] / "configs"
SMOKE = CONFIGS / "smoke.yaml"
LONGEST_TAG = 5000  # of an experiment, in MLflow's sqlite store
LEGAL_COLUMN = {"metrics", "params", "tags"}


@pytest.mark.parametrize("config", ["smoke.yaml", "published/gpt2-large.yaml", "published/phase1.yaml"])
def test_a_saved_view_is_what_the_ui_reads(config):
    study = load(CONFIGS / config)
    tags = view_tags(study, [{"step": 600, "val_nll": 4.0123456789012345}, {"step": 600, "val_nll": 4.2}])
    assert tags.keys() == {f"{VIEW}{view}" for view in views_of(study)} | {ARM_COLOURS}
    assert max(map(len, tags.values())) < LONGEST_TAG
    tags = view_tags(study)
    for view in views_of(study):
        name = VIEWS[view][0]
        envelope = json.loads(tags[f"{VIEW}{view}"])
        assert envelope["name"] == name
        assert isinstance(envelope["createdAt"], int)
        found = json.loads(envelope["state"])
        assert found == state(study, view)
        assert {column.split(".`")[0] for column in found["selectedColumns"]} <= LEGAL_COLUMN
        cards = found["compareRunCharts"]
        assert len({card["uuid"] for card in cards}) == len(cards)
        assert [card["metricSectionId"] for card in cards] == [s["uuid"] for s in found["compareRunSections"]]


def test_the_arms_are_averaged_over_confirm_seeds_and_the_trials_are_all_there():
    study = load(SMOKE)
    arms = state(study, "arms")
    assert arms["searchFilter"] == "tags.stage = 'confirm'"
    assert arms["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "arm"}]
    assert arms["groupsExpanded"] == {f"tag.arm.{arm}": False for arm in study.arms}
    assert (arms["orderByKey"], arms["orderByAsc"]) == ("metrics.`test_nll`", True)
    assert (state(study, "trials")["searchFilter"], state(study, "trials")["groupBy"]) == (
        "tags.stage != 'study'",
        None,
    )
    shown = ["test_nll", "val_nll", "alpha", "seconds"]  # in this order, before the hyperparameters
    assert arms["selectedColumns"] == [*(f"metrics.`{name}`" for name in shown), "params.`lr`"]
    assert arms["columnOrder"][1:] == arms["selectedColumns"]
    assert "metrics.`test_nll`" not in state(study, "trials")["selectedColumns"]
    search_only = parse(SMOKE.read_text() + "stages: [search]\n", Path("searched.yaml"))
    assert state(search_only, "arms")["searchFilter"] == "tags.stage = 'search'"
    assert state(search_only, "arms")["orderByKey"] == "metrics.`val_nll`"
    assert "metrics.`test_nll`" not in state(search_only, "arms")["selectedColumns"]


def test_more_runs_than_a_page_has_come_seed_by_seed_so_that_no_arm_is_averaged_over_its_best():
    text = SMOKE.read_text()
    orders = {
        seeds: state(parse(text.replace("seeds: 3}", f"seeds: {seeds}}}"), Path("s.yaml")), "arms")["orderByKey"]
        for seeds in (20, 21)  # of 5 arms: 100 and 105 runs
    }
    assert orders == {20: "metrics.`test_nll`", 21: "tags.`seed`"}


@pytest.mark.parametrize("view", VIEWS)
def test_no_view_is_sorted_as_the_ui_folds_trials_below_their_study(view):
    assert state(load(SMOKE), view)["orderByKey"] != "attributes.start_time"


def test_the_end_of_the_curves_spans_the_losses_and_their_last_steps():
    rows = [{"step": 600, "val_nll": loss} for loss in (4.0, 4.1, 4.2)]
    (first, last), (low, high) = end_of_curves(rows)
    assert (first, last) == (240.0, 612.0)
    assert (low, high) == (pytest.approx(3.95), pytest.approx(4.25))
    _, (low, high) = end_of_curves(rows[:1])
    assert low < 4.0 < high
    assert end_of_curves([]) is None
    ranges = [card.get("range") for card in state(load(SMOKE), "curves", rows)["compareRunCharts"]]
    assert ranges.count({"xMin": 240.0, "xMax": 612.0, "yMin": pytest.approx(3.95), "yMax": pytest.approx(4.25)}) == 1
    assert all("range" not in card for card in state(load(SMOKE), "curves")["compareRunCharts"])


def test_a_view_that_a_user_saved_over_ours_is_theirs():
    tags = view_tags(load(SMOKE))
    assert all(is_ours(name, value) for name, value in tags.items())
    view = f"{VIEW}trials"
    assert not is_ours(view, json.dumps({**json.loads(tags[view]), "updatedAt": 1_800_000_000_000}))
    assert not is_ours(f"{VIEW}0a1b2c", tags[view])
    assert not is_ours("mlflow.note.content", "a note")


def test_many_arms_make_no_tag_that_a_store_refuses():
    extra = "\n".join(f"  swish-like-candidate-{i:03d}: {{gate: sigmoid, alpha: 0.{i:03d}}}" for i in range(1, 150))
    study = parse(SMOKE.read_text().replace("\nsearch:", f"\n{extra}\nsearch:"), Path("many.yaml"))
    tags = view_tags(study)
    assert tags.keys() == {f"{VIEW}{view}" for view in views_of(study)}  # without the colours of the arms
    assert max(map(len, tags.values())) < LONGEST_TAG


def test_the_views_of_a_ladder_never_average_over_sizes():
    study = ladder_of()
    assert [view for view in views_of(study) if view not in views_of(load(SMOKE))] == ["rungs"]
    for view in ("arms", "curves"):
        assert state(study, view)["searchFilter"] == "tags.stage = 'confirm' and tags.rung = '3'"
    rungs = state(study, "rungs")
    assert rungs["searchFilter"] == "tags.stage = 'confirm'"
    assert [key["groupByData"] for key in rungs["groupBy"]["groupByKeys"]] == ["arm", "rung"]
    assert "params.`rung`" in rungs["selectedColumns"]
    assert len(rungs["groupsExpanded"]) == 12
    assert rungs["groupsExpanded"]["tag.arm.paglu,tag.rung.2"] is False
    assert state(study, "arms")["groupsExpanded"] == dict.fromkeys([f"tag.arm.{arm}" for arm in study.arms], False)


def test_a_long_verdict_is_cut_at_the_end_of_a_line():
    assert _fitting("a short one\n") == "a short one\n"
    cut = _fitting("\n".join(f"line {i} of a table" for i in range(1000)))
    *lines, empty, last = cut.split("\n")
    assert (empty, last) == ("", "The rest is in the report.")
    assert lines == [f"line {i} of a table" for i in range(len(lines))]
    assert 6900 < len(cut) < 7100


def test_parallel_coordinates_go_over_what_every_trial_has():
    chart = state(load(SMOKE), "search")["compareRunCharts"][0]
    assert (chart["type"], chart["selectedParams"], chart["selectedMetrics"]) == (
        "PARALLEL",
        ["lr", "arm"],
        ["alpha", "val_nll"],  # the value at the end of training, which a learned alpha has too
    )
    bare = parse(
        SMOKE.read_text().split("  paglu-searched")[0].replace("gate: sigmoid, alpha: 0.0", "unit: relu2"), SMOKE
    )
    assert state(bare, "search")["compareRunCharts"][0]["selectedMetrics"] == ["val_nll"]


def test_learned_alphas_have_a_chart_where_there_are_any():
    learned = [section["name"] for section in state(load(SMOKE), "arms")["compareRunSections"]]
    assert "Learned alpha by step, first layers" in learned
    text = SMOKE.read_text().splitlines()
    none = "\n".join(line for line in text if "paglu-learnable" not in line and "paglu-per-layer" not in line)
    plain = [s["name"] for s in state(parse(none, Path("plain.yaml")), "arms")["compareRunSections"]]
    assert len(plain) == len(learned) - 1


def test_the_arms_have_the_reports_colours():
    study = load(SMOKE)
    colours = [arm_colour(study, arm) for arm in study.arms]
    assert colours == [palette.INK, *palette.COLOURS[: len(study.arms) - 1]]
    assert json.loads(view_tags(study)[ARM_COLOURS])["tag.arm.linear-floor"] == palette.COLOURS[0]


def verdict_of(*arms, summary="With 8 seeds, against gelu", **more):
    rows = [{"arm": arm, "baseline": "gelu", "verdict": said, "improvement_percent": by} for arm, said, by in arms]
    return {"summary": summary, "comparisons": rows, "floor": "floor"} | more


def test_a_headline_lists_the_arms_by_their_verdict_the_best_first():
    low, same = ("a", "worse", -1.0), ("b", "no difference larger than 0.5%", 0.1)
    rows = [low, ("c", "undecided (needs 3 seeds)", 0.2), ("d", "better", 2.0), ("floor", "worse", -9.0)]
    assert headline(verdict_of(*rows)) == (
        "Better than gelu: d (+2.00%). Worse than gelu: a (-1.00%). Undecided against gelu: c (+0.20%)."
    )
    assert headline(verdict_of(*rows, same)) == (  # no room for the numbers
        "Better than gelu: d. Worse than gelu: a. No difference larger than 0.5% from gelu: b. "
        "Undecided against gelu: c."
    )
    many = verdict_of(*((f"{arm}-of-a-long-name", "better", 1.0) for arm in "abcdef"), low)
    assert "%" not in headline(many)
    assert headline(many).endswith("f-of-a-long-name. Worse than gelu: a.")
    assert headline(verdict_of(low, summary="Preliminary, with 6 seeds")) == "Preliminary. Worse than gelu: a (-1.00%)."
    untold = "not testable: the floor does not lose"
    assert headline(verdict_of(("a", untold, 0.1), ("b", untold, 0.2))) == "Not testable: the floor does not lose."
    assert headline(verdict_of(summary="Unfinished: 3 cells. No arm is compared.")) == "Unfinished: 3 cells."
    trend = {"trends": [{"arm": "a", "baseline": "gelu", "trend": "holds"}], "rungs": [{}, {}, {}]}
    assert headline(verdict_of(low, **trend)) == "Holds over 3 sizes, against gelu: a."


def test_the_description_asks_says_and_links_and_no_name_makes_markup():
    study = load(SMOKE).model_copy(update={"question": "<b>[x](http://y)</b> " + "q" * 1900})
    running, done = note(study, "7", "abc"), note(study, "7", "abc", verdict_of(("gate", "better", 1.0)), "**Better.**")
    assert running.startswith("Running: no verdict yet. ")
    assert done.startswith("Better than gelu: gate (+1.00%). ")
    assert "report.html" not in running
    assert "[Report](#/experiments/7/runs/abc/artifacts/report.html)" in done.split("\n")[0]
    assert all("[Run of the whole study](#/experiments/7/runs/abc)" in text.split("\n")[0] for text in (running, done))
    assert "/runs/" not in note(study, "7", None).replace("/runs?", "")
    assert "**Better.**" in done
    for view in views_of(load(SMOKE)):
        assert view_link("7", view) in done
    assert "<b>" not in done
    assert "[x](" not in done
    assert len(done) < LONGEST_TAG


def test_the_first_page_gives_the_browser_its_settings_and_no_text_ends_the_script():
    from tune.tracking.app import Settings, with_settings

    found = Settings({}, {"1": {"a": "</script><b>"}})
    page = with_settings("<!doctype html><html><head><title>MLflow</title></head></html>", found)
    assert page.index("<script>") < page.index("<title>")
    assert page.count("</script>") == 1
    assert '{"a": "\\u003c/script>\\u003cb>"}' in page
    with pytest.raises(ValueError, match="has no <head>"):
        with_settings("<html></html>", found)


@pytest.fixture(scope="module")
def store(tmp_path_factory, empty_store):
    made = shutil.copy(empty_store, tmp_path_factory.mktemp("store") / "mlflow.db")
    return MlflowClient(tracking_uri=f"sqlite:///{made}")


def test_a_study_opens_on_its_trials_and_with_a_verdict_on_its_arms(store):
    from tune.tracking.app import settings

    study = load(SMOKE)
    number = store.create_experiment("smoke", tags=view_tags(study))
    store.create_experiment("of others")
    entry = f'MLflowLocalStorage-1.1-ExperimentPage-["{number}"]-ReactComponentState'
    found = settings(store)
    assert found.pages == {entry: ("trials", state(study, "trials"))}
    assert found.colours[number] == {f"tag.arm.{arm}": arm_colour(study, arm) for arm in study.arms}
    store.set_experiment_tag(number, OPENS, "arms")
    assert settings(store).pages == {entry: ("arms", state(study, "arms"))}


def test_a_finished_study_renews_its_views_and_leaves_what_a_user_saved(store):
    from tune.tracking.views import NOTE, show

    study, curves, trials = load(SMOKE), f"{VIEW}curves", f"{VIEW}trials"
    number = store.create_experiment("renewed", tags={**view_tags(study), NOTE: "mine", "pagating.armColours": "{}"})
    saved = json.dumps({**json.loads(view_tags(study)[trials]), "updatedAt": 1_800_000_000_000})
    store.set_experiment_tag(number, trials, saved)
    ended = view_tags(study, [{"step": 600, "val_nll": 4.0}])
    show(store, number, {**ended, NOTE: "ours"})
    tags = store.get_experiment(number).tags
    assert (tags[trials], tags[NOTE]) == (saved, "mine")
    assert tags[curves] == ended[curves] != view_tags(study)[curves]
    assert "pagating.armColours" not in tags  # of an earlier version, which the list of experiments showed


def test_the_runs_page_has_all_runs_at_once_and_others_what_they_ask_for():
    from flask import Flask, request

    from tune.tracking.app import all_at_once

    app = Flask("asked")
    app.before_request(all_at_once)
    for path in ("/ajax-api/2.0/mlflow/runs/search", "/api/2.0/mlflow/runs/search"):
        app.add_url_rule(
            path, path, lambda: request.get_json(force=True, silent=True)["max_results"].__str__(), methods=["POST"]
        )
    asked = app.test_client()
    assert asked.post("/ajax-api/2.0/mlflow/runs/search", json={"max_results": 100}).text == "1000"
    assert asked.post("/ajax-api/2.0/mlflow/runs/search", json={"max_results": 5}).text == "5"
    assert asked.post("/api/2.0/mlflow/runs/search", json={"max_results": 100}).text == "100"


@pytest.mark.parametrize(
    ("corpus", "called"),
    [
        ({}, "King James Bible"),
        ({"source": "builtin"}, "King James Bible"),
        (
            {"hub": {"name": "Salesforce/wikitext", "config": "wikitext-2-raw-v1"}},
            "Salesforce/wikitext wikitext-2-raw-v1",
        ),
        ({"hub": {"name": "mine"}}, "mine"),
        ({"files": {"train": "texts/train.txt"}}, "train.txt"),
        ({"files": {"train": ["texts/a.txt", "texts/b.txt"]}}, "a.txt"),
    ],
)
def test_the_dataset_of_a_run_has_the_name_that_a_reader_knows_the_corpus_by(corpus, called):
    from tune.study.sections import CorpusSection

    assert CorpusSection.model_validate(corpus).called == called
