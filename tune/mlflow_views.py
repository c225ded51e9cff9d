"""What MLflow's UI shows of a study: saved views (columns, groups, charts), the arms' colours, the description.

A saved view is an experiment tag of the UI's own making: the menu Views lists it, and a link may name it. Its state is
what the runs page keeps of itself.
"""

from __future__ import annotations

import json
from typing import Any

from analysis.safe_text import markdown, one_line
from tune.study import Study

VIEW = "mlflow.sharedViewState."
COLOUR = "mlflow.runColor"
INK = "#1b1b1c"  # of the baseline, as in the report's figures
COLOURS = ("#2a86c8", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
VIEWS = {  # id: the name in the menu Views, and how a link opens it
    "arms": ("Confirm runs: mean of each arm", "TABLE"),
    "curves": ("Confirm runs: loss curves of each arm", "CHART"),
    "trials": ("All trials, latest first", "TABLE"),
    "search": ("All trials: arm, alpha and learning rate against loss", "CHART"),
}
SINCE = 1_700_000_000_000  # ms; the menu lists the latest first, and the same study gives the same tags


def arm_colour(study: Study, arm: str) -> str:
    """The colour of an arm in the report and in the UI."""
    others = [name for name in study.arms if not study.arms[name].baseline]
    return INK if arm not in others else COLOURS[others.index(arm) % len(COLOURS)]


def view_tags(study: Study) -> dict[str, str]:
    """The experiment tags that hold the saved views of a study."""
    return {f"{VIEW}{view}": _envelope(name, view, state(study, view)) for view, (name, _) in VIEWS.items()}


def _envelope(name: str, view: str, content: dict[str, Any]) -> str:
    made = SINCE - 1000 * list(VIEWS).index(view)
    return json.dumps({"name": name, "createdAt": made, "updatedAt": made, "state": json.dumps(content)})


def state(study: Study, view: str) -> dict[str, Any]:
    """What the runs page keeps of itself, for one of `VIEWS`."""
    of_arms, confirms = view in ("arms", "curves"), "confirm" in study.stages
    shown = ["metrics.`final/test_nll`"] if confirms else []
    shown += ["metrics.`final/val_nll`", "params.`lr`", "params.`alpha`"]
    shown += ["metrics.`final/tokens_per_second`"] if of_arms else ["tags.`stage`", "tags.`outcome`"]
    cards = _arm_cards(study) if of_arms else _trial_cards()
    return {
        "searchFilter": f"tags.stage = '{'confirm' if confirms else 'search'}'" if of_arms else "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": shown,
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "arm"}]}
        if of_arms
        else None,
        "groupsExpanded": {},
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "compareRunSections": [
            {"uuid": "study", "name": "Study", "display": True, "isReordered": True, "deleted": False}
            | {"isGenerated": False}
        ],
        "compareRunCharts": cards,
        "isAccordionReordered": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _card(kind: str, name: str, **fields: Any) -> dict[str, Any]:
    own = {"uuid": name.lower().replace(" ", "-"), "type": kind, "displayName": name, "runsCountToCompare": 1000}
    return {**own, "metricSectionId": "study", "deleted": False, "isGenerated": False, **fields}


def _line(name: str, *metrics: str) -> dict[str, Any]:
    fields = {"metricKey": metrics[0], "selectedMetricKeys": list(metrics), "xAxisKey": "step", "lineSmoothness": 0}
    fields |= {"scaleType": "linear", "xAxisScaleType": "linear", "yAxisKey": "metric", "yAxisExpressions": []}
    return _card("LINE", name, **fields, useGlobalXaxisKey=True, useGlobalLineSmoothing=True, ignoreOutliers=False)


def _arm_cards(study: Study) -> list[dict[str, Any]]:
    alphas = [f"alpha/layer_{layer}" for layer in range(min(study.model.n_layer, 4))]
    return [
        _line("Validation loss by step, nats per token", "val/nll"),
        _card("BAR", "Validation loss at the end, nats per token", metricKey="final/val_nll"),
        *([_line("Learned alpha by step, first layers", *alphas)] if _learns(study) else []),
    ]


def _trial_cards() -> list[dict[str, Any]]:
    lr, loss = {"key": "lr", "type": "PARAM"}, {"key": "final/val_nll", "type": "METRIC"}
    wanted = {"selectedParams": ["arm", "alpha", "lr"], "selectedMetrics": ["final/val_nll"], "showAllRuns": False}
    return [
        _card("PARALLEL", "Arm, alpha and learning rate against validation loss", **wanted),
        _card("SCATTER", "Validation loss against learning rate", xaxis=lr, yaxis=loss),
        _line("Validation loss by step, nats per token", "val/nll"),
    ]


def _learns(study: Study) -> bool:
    return any(getattr(arm.alpha, "learnable", None) for arm in study.arms.values())


def view_link(experiment: str, view: str) -> str:
    """The link to a saved view, within the UI."""
    mode = f"&compareRunsMode={VIEWS[view][1]}"
    return f"#/experiments/{experiment}/runs?viewStateShareKey={view}{mode}&workflowType=machine_learning"


def note(study: Study, experiment: str, verdict: tuple[str, str] | None) -> str:
    """Markdown above a study's runs and in its parent run: the question, the verdict, and where to look.

    `verdict`: the parent run, which has the report, and the verdict's Markdown; None while the study runs.
    """
    links = [f"[{name}]({view_link(experiment, view)})" for view, (name, _) in VIEWS.items()]
    said = "The study is running: no verdict yet."
    if verdict:
        parent, said = verdict
        links.insert(0, f"[Report](#/experiments/{experiment}/runs/{parent}/artifacts/report.html)")
    lines = [f"**{markdown(one_line(study.question, 500))}**", "", said, ""]
    return "\n".join([*lines, *(f"- {link}" for link in links)])
