"""Click through MLflow's UI as `pagating ui` serves it for a finished study; no page may be empty."""

import re
from statistics import fmean

import pytest

from tune.tracking.views import VIEWS, view_link

pytestmark = pytest.mark.slow
ARMS = ("gelu", "linear-floor", "paglu-searched", "paglu-learnable")


@pytest.fixture
def runs(page, address):
    """Return a function that opens the study's runs from the first page, or one of its saved views by name."""

    def opened(view=None):
        page.goto(address)
        study = page.get_by_role("link", name="seen").first
        study.wait_for()  # then the arms' colours are loaded
        if view is None:
            study.click()
            page.get_by_text("matching runs").wait_for()
            return page
        tab = page.context.new_page()  # as a link of the description does
        tab.goto(f"{address}{view_link('1', view)}")
        tab.get_by_text("viewing a shared view").wait_for()
        return tab

    return opened


def name_of(record):
    """Return the name of a cell's run in the UI."""
    cell = record.cell
    alpha = f" alpha={cell.config['alpha']:.2f}" if "alpha" in cell.config else ""
    return f"{cell.arm} lr={cell.config['lr']:.1e}{alpha} seed={cell.seed}"


def chart_below(page, heading):
    """Return the first chart of a section, which is drawn when it is scrolled into view."""
    place = page.get_by_text(heading, exact=True).first
    place.wait_for()
    for _ in range(200):
        place.scroll_into_view_if_needed()
        top = place.bounding_box()["y"]
        for chart in page.locator(".js-plotly-plot").all():
            box = chart.bounding_box()
            if box and top < box["y"] < top + 300:
                return chart
        place.hover()
        page.mouse.wheel(0, 200)
        page.wait_for_timeout(100)
    raise AssertionError(f"no chart below {heading!r}")


def of_stage(records, stage, outcome="completed"):
    return [record for record in records if (record.cell.stage, record.outcome) == (stage, outcome)]


def mean(records, arm, metric):
    return fmean(record.final[metric] for record in of_stage(records, "confirm") if record.cell.arm == arm)


def test_the_first_page_lists_studies_and_what_they_ask(page, address):
    page.goto(address)
    page.get_by_role("link", name="seen").first.wait_for()
    assert page.url == f"{address}#/experiments"
    page.get_by_text("Does a gate that learns lower the loss?").first.wait_for()
    assert "Ask a question" not in page.inner_text("body")  # the assistant is closed


def test_a_study_opens_on_its_trials_with_what_was_tuned(runs, records):
    page = runs()
    losses = [(record.final["val_nll"], name_of(record)) for record in records if "val_nll" in (record.final or {})]
    lowest = [name for _, name in sorted(losses)[:8]]  # rows below the window's end are not drawn
    page.get_by_text(lowest[0]).first.wait_for()
    text = page.inner_text("body")
    for column in ("final/val_nll", "lr", "alpha", "stage", "outcome"):
        assert column in text
    assert "Does a gate that learns lower the loss?" in text
    assert [name for name in lowest if name not in text] == []
    assert f"{len(records)} matching runs" in text


def test_the_menu_offers_the_saved_views(runs):
    page = runs()
    page.get_by_role("button", name="Views").click()
    for name, _ in (VIEWS[view] for view in VIEWS if view != "rungs"):
        page.get_by_text(name).first.wait_for()
    page.get_by_text(VIEWS["arms"][0]).last.click()  # the first is a link of the description
    page.get_by_text("Group: gelu").wait_for()


CHARTS = {"curves": "Validation loss by step, nats per token", "search": "Every trial: alpha, arm, learning rate, loss"}


@pytest.mark.parametrize("view", CHARTS)
def test_the_menu_opens_charts_and_the_table_can_still_be_chosen(runs, view):
    page = runs()
    page.get_by_role("button", name="Views").click()
    page.get_by_text(VIEWS[view][0]).last.click()
    page.get_by_text(CHARTS[view], exact=True).first.wait_for()
    assert "compareRunsMode=CHART" in page.url
    page.evaluate("location.hash = location.hash.replace('compareRunsMode=CHART', 'compareRunsMode=TABLE')")
    page.get_by_text(CHARTS[view], exact=True).first.wait_for(state="hidden")
    assert "compareRunsMode=TABLE" in page.url


def test_arms_are_rows_with_the_mean_over_their_seeds_the_best_first(runs, records):
    page = runs("arms")
    page.get_by_text("Group: gelu").wait_for()
    text = page.inner_text("body")
    losses = {arm: mean(records, arm, "test_nll") for arm in ARMS}
    for arm in ARMS:
        assert str(losses[arm])[:7] in text
    assert sorted(ARMS, key=lambda arm: text.index(f"Group: {arm}")) == sorted(ARMS, key=losses.__getitem__)
    assert "seed=" not in text  # groups are folded


def test_the_loss_curves_have_a_line_for_each_arm_in_its_colour_and_a_chart_of_their_ends(runs):
    page = runs("curves")
    for heading in ("Validation loss by step, nats per token", "The same at the end of training"):
        chart = chart_below(page, heading)
        lines = chart.locator(".scatterlayer .trace path.js-line")
        lines.nth(len(ARMS) - 1).wait_for(state="attached")
        strokes = lines.evaluate_all("lines => lines.map(line => line.style.stroke)")
        assert {"rgb(27, 27, 28)", "rgb(42, 134, 200)", "rgb(213, 94, 0)", "rgb(0, 158, 115)"} <= set(strokes)
    low, high = chart.evaluate("chart => chart._fullLayout.yaxis.range")  # the end fills its chart
    assert 0 < low < high < 1.5 * low


def test_parallel_coordinates_draw_every_arm(runs):
    page = runs("search")
    longest = page.locator("svg text").filter(has_text=re.compile("^paglu-learnable$")).first
    longest.wait_for(state="attached")
    name = longest.bounding_box()
    chart = longest.locator("xpath=ancestor::*[local-name() = 'svg'][last()]").bounding_box()
    assert chart["x"] < name["x"]  # there is no room left of the first axis
    assert name["x"] + name["width"] < chart["x"] + chart["width"]
    drawn = set(page.locator("svg text").all_text_contents())
    assert {*ARMS, "alpha", "lr"} <= drawn
    assert any("val_nll" in text for text in drawn)


def test_the_studys_run_shows_question_verdict_and_report(runs, verdict):
    page = runs()
    with page.context.expect_page() as tab:  # links of a description open a tab of their own
        page.get_by_role("link", name="Run of the whole study").click()
    page = tab.value
    page.get_by_text("About this run").wait_for()
    text = page.inner_text("body")
    assert "Does a gate that learns lower the loss?" in text
    assert verdict["comparisons"][-1]["verdict"].split()[0] in text
    for name in ("improvement_percent/paglu-learnable", "n_layer", "batch_tokens"):
        assert name in text
    with page.context.expect_page() as tab:
        page.get_by_role("link", name="Report", exact=True).first.click()
    shown = tab.value.frame_locator("iframe").first
    shown.get_by_role("heading", name="Paired differences").wait_for()
    assert shown.locator("figure svg").count() >= 4


@pytest.mark.parametrize(("outcome", "status"), [("infeasible", "Failed"), ("stopped_early", "Killed")])
def test_a_trial_that_failed_or_was_stopped_looks_it(runs, records, outcome, status):
    page = runs()
    record = of_stage(records, "search", outcome)[0]
    page.get_by_placeholder("metrics.rmse").fill(f"tags.cell = '{record.cell.key}'")
    page.keyboard.press("Enter")
    page.get_by_role("gridcell", name=outcome, exact=True).first.wait_for()
    page.get_by_role("link", name=name_of(record)).first.click()
    page.get_by_text("About this run").wait_for()
    text = page.inner_text("body")
    assert status in text
    assert outcome in text
    assert (record.reason or "among the worse of its arm's trials") in text


def test_two_trials_of_two_arms_are_compared(runs):
    page = runs()
    rows = page.get_by_role("row").filter(has_text="seed=103")
    for place in (0, 1):
        rows.nth(place).get_by_role("checkbox").check()
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Comparing 2 Runs").first.wait_for()
    text = page.inner_text("body")
    for word in ("seed=103", "lr", "alpha", "final/test_nll"):
        assert word in text


def test_a_trial_names_the_corpus_it_was_trained_on(runs, records):
    page = runs()
    page.get_by_role("link", name=name_of(of_stage(records, "confirm")[-1])).first.click()
    page.get_by_text("Datasets", exact=True).first.wait_for()
    page.get_by_text("King James Bible").first.wait_for()


def test_the_best_model_of_each_arm_is_offered(page, address):
    page.goto(f"{address}#/experiments/1/models")
    for arm in ARMS:
        page.get_by_role("link", name=re.compile(rf"^{arm}\b")).first.wait_for()
