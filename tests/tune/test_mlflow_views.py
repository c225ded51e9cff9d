import json
from pathlib import Path

import pytest

from analysis import plots
from tune import mlflow_views
from tune.mlflow_views import VIEW, VIEWS, arm_colour, note, state, view_link, view_tags
from tune.study import load, parse

CONFIGS = Path(__file__).parents[2] / "configs"
SMOKE = CONFIGS / "smoke.yaml"
LONGEST_TAG = 5000  # of an experiment, in MLflow's sqlite store
LEGAL_COLUMN = {"metrics", "params", "tags"}


@pytest.mark.parametrize("config", ["smoke.yaml", "published/gpt2-large.yaml", "published/phase1.yaml"])
def test_a_saved_view_is_what_the_ui_reads(config):
    study = load(CONFIGS / config)
    tags = view_tags(study)
    assert tags.keys() == {f"{VIEW}{view}" for view in VIEWS}
    assert max(map(len, tags.values())) < LONGEST_TAG
    for view, (name, _) in VIEWS.items():
        envelope = json.loads(tags[f"{VIEW}{view}"])
        assert envelope["name"] == name
        assert isinstance(envelope["createdAt"], int)
        found = json.loads(envelope["state"])
        assert found == state(study, view)
        assert {column.split(".`")[0] for column in found["selectedColumns"]} <= LEGAL_COLUMN
        cards = found["compareRunCharts"]
        assert len({card["uuid"] for card in cards}) == len(cards)
        assert {card["metricSectionId"] for card in cards} == {found["compareRunSections"][0]["uuid"]}


def test_the_arms_are_averaged_over_confirm_seeds_and_the_trials_are_all_there():
    study = load(SMOKE)
    assert state(study, "arms")["searchFilter"] == "tags.stage = 'confirm'"
    assert state(study, "arms")["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "arm"}]
    assert (state(study, "trials")["searchFilter"], state(study, "trials")["groupBy"]) == ("", None)
    search_only = parse(SMOKE.read_text() + "stages: [search]\n", Path("searched.yaml"))
    assert state(search_only, "arms")["searchFilter"] == "tags.stage = 'search'"
    assert "metrics.`final/test_nll`" not in state(search_only, "arms")["selectedColumns"]


def test_parallel_coordinates_go_over_what_every_trial_has():
    chart = state(load(SMOKE), "search")["compareRunCharts"][0]
    assert (chart["type"], chart["selectedParams"], chart["selectedMetrics"]) == (
        "PARALLEL",
        ["arm", "alpha", "lr"],
        ["final/val_nll"],
    )


def test_learned_alphas_have_a_chart_where_there_are_any():
    learned = [card["displayName"] for card in state(load(SMOKE), "arms")["compareRunCharts"]]
    assert "Learned alpha by step, first layers" in learned
    text = SMOKE.read_text().splitlines()
    none = "\n".join(line for line in text if "paglu-learnable" not in line and "paglu-per-layer" not in line)
    plain = [card["displayName"] for card in state(parse(none, Path("plain.yaml")), "arms")["compareRunCharts"]]
    assert len(plain) == len(learned) - 1


def test_the_arms_have_the_reports_colours():
    assert (mlflow_views.INK, mlflow_views.COLOURS) == (plots.INK, plots.COLOURS)
    study = load(SMOKE)
    colours = [arm_colour(study, arm) for arm in study.arms]
    assert colours[:3] == [plots.INK, *plots.COLOURS[:2]]
    assert len(set(colours)) == len(study.arms)


def test_the_description_asks_says_and_links_and_no_name_makes_markup():
    study = load(SMOKE).model_copy(update={"question": "<b>[x](http://y)</b> " + "q" * 1900})
    running, done = note(study, "7", None), note(study, "7", ("abc", "**Better.**"))
    assert "The study is running" in running
    assert "report.html" not in running
    assert "[Report](#/experiments/7/runs/abc/artifacts/report.html)" in done
    assert "**Better.**" in done
    for view in VIEWS:
        assert view_link("7", view) in done
    assert "<b>" not in done
    assert "[x](" not in done
    assert len(done) < LONGEST_TAG


def test_the_first_page_gives_the_browser_its_settings_and_no_text_ends_the_script():
    from tune.mlflow_app import with_settings

    page = with_settings("<!doctype html><html><head><title>MLflow</title></head></html>", {"a": "</script><b>"})
    assert page.index("<script>") < page.index("<title>")
    assert page.count("</script>") == 1
    assert '{"a": "\\u003c/script>\\u003cb>"}' in page
    with pytest.raises(ValueError, match="has no <head>"):
        with_settings("<html></html>", {})
