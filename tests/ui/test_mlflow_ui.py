"""Click through MLflow's UI as `pagating ui` serves it for finished studies; no page may be empty."""

import re
from statistics import fmean

import pytest

from tune.run import ledger
from tune.study.files import load
from tune.tracking.verdict import headline
from tune.tracking.views import VIEWS, group_colours, name_of, view_link, views_of

pytestmark = pytest.mark.slow
ARMS = ("gelu", "linear-floor", "paglu-searched", "paglu-learnable")


NUMBERS = {"seen": "1", "own": "2", "steps": "3"}  # ids of the experiments


@pytest.fixture
def runs(page, address):
    """Return a function that opens a study's runs from the first page, or one of its saved views by a link."""

    def opened(view=None, study="seen"):
        page.goto(address)
        link = page.get_by_role("link", name=study, exact=True).first
        link.wait_for()
        if view is None:
            link.click()
            page.get_by_text("matching runs").wait_for()
            return page
        tab = page.context.new_page()  # as a link of the description does
        tab.goto(f"{address}{view_link(NUMBERS[study], view)}")
        tab.get_by_text("viewing a shared view").wait_for()
        return tab

    return opened


def confirms_of(study, name):
    """Return the completed confirm trials of a study, on the top rung of a ladder."""
    found = of_stage(ledger.records(ledger.read(study.parent / name / "ledger.jsonl")).values(), "confirm")
    return [record for record in found if record.cell.rung == max(each.cell.rung for each in found)]


def called(record):
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


def test_the_first_page_lists_studies_and_what_they_found(page, address, study, verdict):
    page.goto(address)
    page.get_by_role("link", name="seen").first.wait_for()
    assert page.url == f"{address}#/experiments"
    page.get_by_text(headline(verdict)).first.wait_for()
    text = page.inner_text("body")
    assert "Ask a question" not in text  # the assistant is closed
    assert "Better than plain: new (+" in text
    assert "tag.arm" not in text  # what only this project reads is no tag in the list


FIRST = {"seen": ("test_nll", 1), "own": ("test_accuracy", -1), "steps": ("test_nll", 1)}  # and 1 if lower is better


@pytest.mark.parametrize("name", FIRST)
def test_a_study_opens_on_its_arms_with_the_mean_over_their_seeds_the_best_first(runs, study, name):
    page, (metric, sign), found = runs(study=name), FIRST[name], confirms_of(study, name)
    values = {arm: sign * mean(found, arm, "test_nll") for arm in {record.cell.arm for record in found}}
    order = sorted(values, key=values.__getitem__, reverse=sign < 0)
    page.get_by_text(f"Group: {order[-1]}", exact=True).wait_for()
    text = page.inner_text("body")
    assert f"{len(found)} matching runs" in text
    assert "seed=" not in text  # groups are folded
    assert re.findall(r"Group: ([\w-]+)", text) == order
    for value in values.values():
        assert str(value)[:7] in text
    colours = group_colours(load(study.parent / name / "study.yaml"))
    for arm in values:  # as in the report, also if an arm of another study has the same name
        row = page.get_by_role("row").filter(has_text=f"Group: {arm}").first
        fills = "row => [...row.querySelectorAll('*')].map((each) => getComputedStyle(each).backgroundColor)"
        red, green, blue = bytes.fromhex(colours[f"tag.arm.{arm}"][1:])
        assert f"rgb({red}, {green}, {blue})" in row.evaluate(fills)
    columns = (metric, "seconds", "Duration")
    place = {name: page.get_by_role("columnheader", name=name).first for name in columns}
    page.wait_for_function("header => header.getBoundingClientRect().x < 800", arg=place[metric].element_handle())
    left = {name: header.bounding_box()["x"] for name, header in place.items()}
    assert left[metric] < left["seconds"] < left["Duration"]  # the order in the page's text is another one


def test_all_trials_have_what_was_tuned_the_best_first(runs, records):
    page = runs("trials")
    losses = [(record.final["val_nll"], called(record)) for record in records if "val_nll" in (record.final or {})]
    lowest = [name for _, name in sorted(losses)[:8]]  # rows below the window's end are not drawn
    page.get_by_text(lowest[0]).first.wait_for()
    text = page.inner_text("body")
    for column in ("val_nll", "lr", "alpha", "stage", "outcome"):
        assert column in text
    assert [name for name in lowest if name not in text] == []
    assert f"{len(records)} matching runs" in text


def test_the_description_begins_with_the_verdict_and_unfolds_to_question_views_and_files(runs, verdict):
    page = runs()
    page.get_by_text(headline(verdict)).first.wait_for()
    page.locator("[data-component-id='mlflow.experiment.metadata_editor.expand_button']").click()
    page.get_by_text("Files: ").wait_for()
    text = page.inner_text("body")
    said = [headline(verdict), "Does a gate that learns lower the loss?", VIEWS["arms"][0], "verdict.json"]
    assert sorted(said, key=text.index) == said


@pytest.mark.parametrize("name", NUMBERS)
def test_the_menu_opens_every_saved_view_as_a_table_or_as_charts(runs, study, name):
    page, loaded = runs(study=name), load(study.parent / name / "study.yaml")
    for view in views_of(loaded):
        page.get_by_role("button", name=re.compile("Views|runs:|trials")).first.click()
        page.get_by_text(name_of(loaded, view)).last.click()  # the first is a link of the description
        page.get_by_text("viewing a shared view").wait_for()
        if VIEWS[view][1] == "CHART":
            page.locator(".js-plotly-plot, svg .parcoords, .parcoords").first.wait_for()
            assert "compareRunsMode=CHART" in page.url
        else:
            page.get_by_text(re.compile("Group: |seed=")).first.wait_for()
            assert "compareRunsMode=CHART" not in page.url


CHARTS = {"curves": "Validation loss by step, nats per token", "search": "Every trial: lr, arm, alpha, val_nll"}


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


SECTIONS = {"seen": ["alpha", "train", "val", "Model metrics"], "own": ["train", "val", "Model metrics"]}


@pytest.mark.parametrize("name", SECTIONS)
def test_the_page_of_a_trial_has_its_parameters_and_curves_before_single_values(runs, name):
    page = runs("trials", name)
    page.get_by_role("link", name=re.compile("paglu-learnable|new ")).first.click()
    page.get_by_text("About this run").wait_for()
    constants = ("d_model", "precision", "weight_decay", "tokens") if name == "seen" else ("epochs", "kind")
    for parameter in ("seed", "arm", *constants):
        page.get_by_text(parameter, exact=True).first.wait_for()
    page.get_by_text("Model metrics", exact=True).first.click()
    page.get_by_text(re.compile(r"^\(\d+\)$")).nth(len(SECTIONS[name]) - 1).wait_for()  # number of charts of a section
    headings = page.get_by_text(re.compile(r"^\(\d+\)$")).locator("xpath=..").all_inner_texts()
    assert [heading.split("\n")[0] for heading in headings] == SECTIONS[name]
    chart = chart_below(page, "val")
    assert len(chart.evaluate("chart => chart.data[0].x")) > 2


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
    shown.get_by_role("heading", name="Seed by seed").wait_for()
    assert shown.locator("figure svg").count() >= 4


@pytest.mark.parametrize(("outcome", "status"), [("infeasible", "Failed"), ("stopped_early", "Killed")])
def test_a_trial_that_failed_or_was_stopped_looks_it(runs, records, outcome, status):
    page = runs("trials")
    record = of_stage(records, "search", outcome)[0]
    page.get_by_placeholder("metrics.rmse").fill(f"tags.cell = '{record.cell.key}'")
    page.keyboard.press("Enter")
    page.get_by_role("gridcell", name=outcome, exact=True).first.wait_for()
    page.get_by_role("link", name=called(record)).first.click()
    page.get_by_text("About this run").wait_for()
    text = page.inner_text("body")
    assert status in text
    assert outcome in text
    assert (record.reason or "among the worse of its arm's trials") in text


def test_two_trials_of_two_arms_are_compared(runs):
    page = runs("trials")
    rows = page.get_by_role("row").filter(has_text="seed=103")
    for place in (0, 1):
        rows.nth(place).get_by_role("checkbox").check()
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Comparing 2 Runs").first.wait_for()
    text = page.inner_text("body")
    for word in ("seed=103", "lr", "alpha", "test_nll"):
        assert word in text


def test_a_trial_names_the_corpus_it_was_trained_on(runs, records):
    page = runs("trials")
    page.get_by_role("link", name=called(of_stage(records, "confirm")[-1])).first.click()
    page.get_by_text("Datasets", exact=True).first.wait_for()
    page.get_by_text("King James Bible").first.wait_for()


def test_the_best_model_of_each_arm_is_offered(page, address):
    page.goto(f"{address}#/experiments/1/models")
    for arm in ARMS:
        page.get_by_role("link", name=re.compile(rf"^{arm}\b")).first.wait_for()
