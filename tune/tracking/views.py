"""What MLflow's UI shows of a study: saved views (columns, groups, charts), the arms' colours, the description.

A saved view is an experiment tag of the UI's own making: the menu Views lists it, and a link may name it. Its state is
what the runs page keeps of itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.io.text import markdown, one_line
from analysis.report.palette import INK, colour_of
from tune.run import ledger
from tune.study.study import Study

VIEW = "mlflow.sharedViewState."
COLOUR = "mlflow.runColor"
NOTE = "mlflow.note.content"  # the description of a run, or of an experiment
VIEWS = {  # id: the name in the menu Views, which cuts it after 32 letters, and how a link opens it
    "arms": ("Confirm runs: mean of each arm", "TABLE"),
    "curves": ("Confirm runs: loss curve by arm", "CHART"),
    "trials": ("All trials, lowest loss first", "TABLE"),
    "search": ("All trials: alpha, arm, lr, loss", "CHART"),
}
SINCE = 1_700_000_000_000  # ms; the menu lists the latest first, and the same study gives the same tags
NAME = "attributes.`Run Name`"
PAGE = 100  # runs that the runs page loads at first
ARM_COLOURS = "pagating.armColours"  # what the first page of `pagating ui` gives the browser
LONGEST = 5000  # characters of an experiment's tag in MLflow's sqlite store
Range = tuple[float, float]


def arm_colour(study: Study, arm: str) -> str:
    """The colour of an arm in the report and in the UI."""
    others = [name for name in study.arms if not study.arms[name].baseline]
    return INK if arm not in others else colour_of(others.index(arm))


def group_colours(study: Study) -> dict[str, str]:
    """The colour of each arm by the name that the runs page gives its group."""
    return {f"tag.arm.{arm}": arm_colour(study, arm) for arm in study.arms}


def end_of_curves(ends: Sequence[dict[str, Any]]) -> tuple[Range, Range] | None:
    """Steps and losses (nats) between which the ends of the loss curves lie: what tells arms apart; None without any.

    `ends`: the last row of the curve (`step`, `val_nll`) of each confirm trial.
    """
    if not ends:
        return None
    last, losses = max(row["step"] for row in ends), [row["val_nll"] for row in ends]
    room = max(0.25 * (max(losses) - min(losses)), 1e-3 * max(losses))
    return (0.4 * last, 1.02 * last), (min(losses) - room, max(losses) + room)


def view_tags(study: Study, ends: Sequence[dict[str, Any]] = ()) -> dict[str, str]:
    """The experiment tags that hold the saved views and the arms' colours of a study; `ends` as in `end_of_curves`."""
    tags = {f"{VIEW}{view}": _envelope(view, state(study, view, ends)) for view in VIEWS}
    tags[ARM_COLOURS] = json.dumps(group_colours(study))
    return {name: value for name, value in tags.items() if len(value) < LONGEST}


def is_ours(tag: str, value: str) -> bool:
    """Whether an experiment's tag is as we wrote it: not a view that a user saved over ours, nor a tag of others."""
    view = tag.removeprefix(VIEW)
    return tag == ARM_COLOURS or (view in VIEWS and json.loads(value).get("updatedAt") == _made(view))


def _made(view: str) -> int:
    return SINCE - 1000 * list(VIEWS).index(view)


def _envelope(view: str, content: dict[str, Any]) -> str:
    made = _made(view)
    whole = {"name": VIEWS[view][0], "createdAt": made, "updatedAt": made, "state": json.dumps(content)}
    if len(json.dumps(whole)) >= LONGEST:  # many arms: their groups open unfolded
        whole["state"] = json.dumps({**content, "groupsExpanded": {}})
    return json.dumps(whole)


def state(study: Study, view: str, ends: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """What the runs page keeps of itself, for one of `VIEWS`; `ends` as in `end_of_curves`.

    None is ordered by the start: the page would fold the trials away below their study's run, and draw none of them.
    """
    of_arms, confirms = view in ("arms", "curves"), "confirm" in study.stages
    shown = ["metrics.`final/test_nll`"] if of_arms and confirms else []  # no single trial is to be chosen by it
    shown += ["metrics.`final/val_nll`", "params.`lr`", "params.`alpha`"]
    shown += ["metrics.`final/seconds`"] if of_arms else ["tags.`stage`", "tags.`outcome`"]
    sections = _arm_sections(study, ends) if of_arms else _trial_sections()
    return {
        "searchFilter": f"tags.stage = '{'confirm' if confirms else 'search'}'" if of_arms else "tags.stage != 'study'",
        "orderByKey": _order(study) if of_arms else "metrics.`final/val_nll`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": shown,
        "columnOrder": [NAME],
        "columnWidths": {NAME: 330},  # of a run, whole
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "arm"}]}
        if of_arms
        else None,
        "groupsExpanded": dict.fromkeys(group_colours(study), False) if of_arms else {},
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "compareRunSections": [_section(name, len(cards)) for name, cards in sections.items()],
        "compareRunCharts": [
            {**card, "uuid": f"{_id(name)}-{place}", "metricSectionId": _id(name)}
            for name, cards in sections.items()
            for place, card in enumerate(cards)
        ],
        "isAccordionReordered": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _order(study: Study) -> str:
    """Arms by their loss; more runs than the page loads by seed: it then averages every arm over the same seeds."""
    confirms = "confirm" in study.stages
    runs = len(study.arms) * (study.confirm.looks[-1] if confirms else study.search.trials_per_arm)
    if runs > PAGE:
        return "tags.`seed`"
    return f"metrics.`final/{'test' if confirms else 'val'}_nll`"


def _id(name: str) -> str:
    return name.lower().replace(" ", "-").replace(",", "").replace(":", "")


def _section(name: str, columns: int) -> dict[str, Any]:
    shape = {"columns": columns, "cardHeight": 420, "display": True, "isReordered": True}
    return {"uuid": _id(name), "name": name, **shape, "deleted": False, "isGenerated": False}


def _card(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "runsCountToCompare": 1000, "deleted": False, "isGenerated": False, **fields}


def _line(*metrics: str, **fields: Any) -> dict[str, Any]:
    own = {"metricKey": metrics[0], "selectedMetricKeys": list(metrics), "xAxisKey": "step", "lineSmoothness": 0}
    own |= {"scaleType": "linear", "xAxisScaleType": "linear", "yAxisKey": "metric", "yAxisExpressions": []}
    return _card("LINE", **own | fields, useGlobalXaxisKey=True, useGlobalLineSmoothing=True, ignoreOutliers=False)


def _arm_sections(study: Study, ends: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    # a card has no title of its own for a metric, and a linear axis starts at 0, where no arm can be told from another
    sections = {"Validation loss by step, nats per token": [_line("val/nll", scaleType="log")]}
    if end := end_of_curves(ends):
        (x0, x1), (y0, y1) = end
        close = _line("val/nll", range={"xMin": x0, "xMax": x1, "yMin": y0, "yMax": y1})
        sections["The same at the end of training"] = [close]
    if _learns(study):
        alphas = [f"alpha/layer_{layer}" for layer in range(min(study.model.n_layer, 4))]
        sections["Learned alpha by step, first layers"] = [_line(*alphas)]
    return sections


def _trial_sections() -> dict[str, list[dict[str, Any]]]:
    lr, loss = {"key": "lr", "type": "PARAM"}, {"key": "final/val_nll", "type": "METRIC"}
    # the arm's axis is not the first, at whose left long names would be cut
    wanted = {"selectedParams": ["alpha", "arm", "lr"], "selectedMetrics": ["final/val_nll"], "showAllRuns": False}
    return {
        "Every trial: alpha, arm, learning rate, loss": [_card("PARALLEL", **wanted)],
        "Validation loss against learning rate": [_card("SCATTER", xaxis=lr, yaxis=loss)],
        "Validation loss by step, nats per token": [_line("val/nll", scaleType="log")],
    }


def _learns(study: Study) -> bool:
    return any(getattr(arm.alpha, "learnable", None) for arm in study.arms.values())


def view_link(experiment: str, view: str) -> str:
    """The link to a saved view, within the UI."""
    mode = f"&compareRunsMode={VIEWS[view][1]}"
    return f"#/experiments/{experiment}/runs?viewStateShareKey={view}{mode}&workflowType=machine_learning"


def note(study: Study, experiment: str, parent: str | None, said: str | None) -> str:
    """Markdown above a study's runs and in its own run: the question, the verdict, and where to look.

    `parent`: the study's own run, to link to; `said`: the verdict's Markdown, None while there is none. The page shows
    the first line until it is unfolded.
    """
    first = [f"**{markdown(one_line(study.question, 500))}**"]
    if parent:
        own = f"#/experiments/{experiment}/runs/{parent}"
        first += [f"[Report]({own}/artifacts/report.html)"] if said else []
        first += [f"[Run of the whole study]({own})"]
    links = [f"- [{name}]({view_link(experiment, view)})" for view, (name, _) in VIEWS.items()]
    return "\n".join([" · ".join(first), "", said or "The study is running: no verdict yet.", "", *links])


def show(client: Any, experiment: str, tags: dict[str, str]) -> None:
    """Set an experiment's views and description; who saved a view over ours, or described the study, keeps theirs."""
    there = client.get_experiment(experiment).tags
    for name, value in tags.items():
        if there.get(name) != value and (name not in there or is_ours(name, there[name])):
            client.set_experiment_tag(experiment, name, value)


def log_verdict(uri: str, study: Study, parent_id: str, folder: Path, verdict: dict[str, Any]) -> None:
    """Put the verdict into the parent run: description, a metric for each arm, and the report as artifacts."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(tracking_uri=uri)
    table = (folder / "verdict.md").read_text(encoding="utf-8").split("\n", 4)[4]  # below the name and the question
    events = ledger.read(folder / "ledger.jsonl")
    now = round(1000 * max(event["time"] for event in events))
    metrics = [
        Metric(f"improvement_percent/{row['arm']}", row["improvement_percent"], now, 0)
        for row in verdict["comparisons"]
        if row["improvement_percent"] is not None
    ]
    client.log_batch(parent_id, metrics=metrics)
    experiment = client.get_run(parent_id).info.experiment_id
    client.set_tag(parent_id, NOTE, note(study, experiment, parent_id, table))
    client.set_experiment_tag(experiment, NOTE, note(study, experiment, parent_id, table.strip().split("\n", 1)[0]))
    confirms = [r for r in ledger.records(events).values() if r.cell.stage == "confirm" and r.outcome == "completed"]
    ends = [record.curve[-1] for record in confirms if record.curve]
    show(client, experiment, view_tags(study, ends))
    for name in ("study.yaml", "verdict.json", "verdict.md", "report.html"):
        client.log_artifact(parent_id, str(folder / name))
    client.set_terminated(parent_id)
