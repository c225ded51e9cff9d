"""Display of a study in MLflow's UI: saved views (columns, groups, charts) and the arms' colours.

A saved view is an experiment tag in a format of the UI. The menu Views lists it, and a link can open it. It contains
the state of the runs page.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from analysis.report.palette import INK, colour_of
from tune.study.study import Study

VIEW = "mlflow.sharedViewState."
COLOUR = "mlflow.runColor"
NOTE = "mlflow.note.content"  # description of a run or of an experiment
VIEWS = {  # id: (name in the menu Views, which shows 32 letters; mode of the page that a link opens)
    "arms": ("Confirm runs: mean of each arm", "TABLE"),
    "curves": ("Confirm runs: loss curve by arm", "CHART"),
    "trials": ("All trials, lowest loss first", "TABLE"),
    "search": ("All trials: lr, arm, alpha, loss", "CHART"),
    "rungs": ("Confirm runs: mean by arm, rung", "TABLE"),  # only of a ladder
}
SINCE = 1_700_000_000_000  # ms; fixed, so that a study always has the same tags; the menu lists the latest first
NAME = "attributes.`Run Name`"
PAGE = 100  # number of runs that the runs page loads at first
HIDDEN = "mlflow.pagating."  # the list of experiments shows every tag that does not begin with mlflow.
ARM_COLOURS = f"{HIDDEN}armColours"  # tag with the colours that `pagating ui` stores in the browser
OPENS = f"{HIDDEN}opens"  # tag with the view that `pagating ui` opens a study on; without it, all trials
OLD_COLOURS = "pagating.armColours"  # tag of earlier versions
LONGEST = 5000  # maximal number of characters of an experiment's tag in MLflow's sqlite store
Range = tuple[float, float]


def arm_colour(study: Study, arm: str) -> str:
    """Return the colour of an arm in the report and in the UI."""
    others = [name for name in study.arms if not study.arms[name].baseline]
    return INK if arm not in others else colour_of(others.index(arm))


def views_of(study: Study) -> list[str]:
    """Return the keys of the views that a study has."""
    return [view for view in VIEWS if view != "rungs" or study.scales]


def name_of(study: Study, view: str) -> str:
    """Return the name of a view in the menu Views."""
    own = {"curves": "Confirm runs: curve by arm", "trials": "All trials, the best first"} if study.shown else {}
    own |= {"search": "All trials: arm, settings, metric"} if study.shown else {}
    return own.get(view, VIEWS[view][0])


def group_colours(study: Study) -> dict[str, str]:
    """Return the colour of each arm by the name of its group on the runs page."""
    views = ["arms", "rungs"] if study.scales else ["arms"]
    return {group: arm_colour(study, arm) for view in views for group, arm in _groups(study, view).items()}


def _groups(study: Study, view: str) -> dict[str, str]:
    """Return the arm of each group of a view, by the name of the group on the runs page."""
    ends = [f",tag.rung.{rung}" for rung in range(1, len(study.scales) + 1)] if view == "rungs" else [""]
    return {f"tag.arm.{arm}{end}": arm for end in ends for arm in study.arms}


def end_of_curves(ends: Sequence[dict[str, Any]]) -> tuple[Range, Range] | None:
    """Return the ranges of steps and of losses (nats per token) that show the ends of the loss curves.

    Args:
        ends: Last row of the curve (`step`, `val_nll`) of each confirm trial.

    Returns:
        The two ranges, or None if there are no curves.
    """
    if not ends:
        return None
    last, losses = max(row["step"] for row in ends), [row["val_nll"] for row in ends]
    room = max(0.25 * (max(losses) - min(losses)), 1e-3 * abs(max(losses)))
    return (0.4 * last, 1.02 * last), (min(losses) - room, max(losses) + room)


def view_tags(study: Study, ends: Sequence[dict[str, Any]] = ()) -> dict[str, str]:
    """Return the experiment tags with a study's saved views and its arms' colours. For `ends` see `end_of_curves`."""
    tags = {
        f"{VIEW}{view}": _envelope(view, name_of(study, view), state(study, view, ends)) for view in views_of(study)
    }
    tags[ARM_COLOURS] = json.dumps(group_colours(study))
    return {name: value for name, value in tags.items() if len(value) < LONGEST}


def is_ours(tag: str, value: str) -> bool:
    """Return True if this project wrote an experiment's tag, and no user has saved another view over it."""
    view = tag.removeprefix(VIEW)
    return tag.startswith(HIDDEN) or (view in VIEWS and json.loads(value).get("updatedAt") == _made(view))


def _made(view: str) -> int:
    """Return the creation time of a view in milliseconds since 1970."""
    return SINCE - 1000 * list(VIEWS).index(view)


def _envelope(view: str, name: str, content: dict[str, Any]) -> str:
    made = _made(view)
    whole = {"name": name, "createdAt": made, "updatedAt": made, "state": json.dumps(content)}
    if len(json.dumps(whole)) >= LONGEST:  # too many arms: do not store that their groups are folded
        whole["state"] = json.dumps({**content, "groupsExpanded": {}})
    return json.dumps(whole)


def state(study: Study, view: str, ends: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return the state of MLflow's runs page for one of `VIEWS`.

    No view is ordered by the start time, because the page would then hide the trials below their study's run.

    Args:
        study: The study.
        view: Key of `VIEWS`.
        ends: See `end_of_curves`.
    """
    of_arms, confirms = view in ("arms", "curves", "rungs"), "confirm" in study.stages
    rows = f"tags.stage = '{'confirm' if confirms else 'search'}'" if of_arms else "tags.stage != 'study'"
    if study.scales and view in ("arms", "curves"):  # a mean over sizes would say nothing
        rows += f" and tags.rung = '{len(study.scales)}'"
    groups = [{"mode": "tag", "groupByData": tag} for tag in ("arm", *(["rung"] if view == "rungs" else []))]
    validation, test = (study.shown.get(name, name) for name in ("val_nll", "test_nll"))
    shown = [f"metrics.`{test}`"] if of_arms and confirms else []  # never chosen by: not in lists of trials
    shown += [f"metrics.`{validation}`", *(["metrics.`alpha`"] if _gated(study) else [])]
    shown += ["metrics.`seconds`"] if of_arms else []
    shown += ["params.`rung`"] if study.scales else []
    shown += [f"params.`{name}`" for name in study.nuisance]
    shown += [] if of_arms else ["tags.`stage`", "tags.`outcome`"]
    sections = _arm_sections(study, ends) if of_arms else _trial_sections(study)
    return {
        "searchFilter": rows,
        "orderByKey": _order(study) if of_arms else f"metrics.`{validation}`",
        "orderByAsc": study.sign > 0,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": shown,
        "columnOrder": [NAME, *shown],
        "columnWidths": {NAME: 330},  # fits the whole name of a run
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": groups} if of_arms else None,
        "groupsExpanded": dict.fromkeys(_groups(study, view), False) if of_arms else {},
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
    """Return the sort key of the arms' views: their loss, or the seed if there are more runs than the page loads.

    Sorted by seed, the page averages every arm over the same seeds.
    """
    confirms = "confirm" in study.stages
    runs = len(study.arms) * (study.confirm.looks[-1] if confirms else study.search.trials_per_arm)
    if runs > PAGE:
        return "tags.`seed`"
    name = f"{'test' if confirms else 'val'}_nll"
    return f"metrics.`{study.shown.get(name, name)}`"


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
    # A card has no title for a metric. A linear axis starts at 0, so that all arms look the same.
    title, line = _loss(study)
    sections = {title: [_line(line, **({} if study.shown else {"scaleType": "log"}))]}
    if end := end_of_curves([{**row, "val_nll": study.sign * row["val_nll"]} for row in ends]):
        (x0, x1), (y0, y1) = end
        close = _line(line, range={"xMin": x0, "xMax": x1, "yMin": y0, "yMax": y1})
        sections["The same at the end of training"] = [close]
    if _learns(study):
        alphas = [f"alpha/layer_{layer}" for layer in range(min(study.model.n_layer, 4))]
        sections["Learned alpha by step, first layers"] = [_line(*alphas)]
    return sections


def _loss(study: Study) -> tuple[str, str]:
    """Return the title of the charts of the validation metric, and its name in MLflow."""
    name = study.shown.get("val_nll")
    return (f"{name} by step", f"val/{name}") if name else ("Validation loss by step, nats per token", "val/nll")


def _trial_sections(study: Study) -> dict[str, list[dict[str, Any]]]:
    final, (title, line) = study.shown.get("val_nll", "val_nll"), _loss(study)
    first, loss = {"key": study.first, "type": "PARAM"}, {"key": final, "type": "METRIC"}
    settings, metrics = list(study.nuisance), [*(["alpha"] if _gated(study) else []), final]
    params = [*settings[:1], "arm", *settings[1:]]  # there is no room for the names of arms left of the first axis
    wanted = {"selectedParams": params, "selectedMetrics": metrics, "showAllRuns": False}
    return {
        f"Every trial: {', '.join([*params, *metrics])}": [_card("PARALLEL", **wanted)],
        **({f"{final} against {study.first}": [_card("SCATTER", xaxis=first, yaxis=loss)]} if study.first else {}),
        title: [_line(line, scaleType="linear" if study.shown else "log")],
    }


def _gated(study: Study) -> bool:
    """Return True if any arm has an alpha."""
    return not study.shown and any(arm.alpha is not None for arm in study.arms.values())


def _learns(study: Study) -> bool:
    return any(getattr(arm.alpha, "learnable", None) for arm in study.arms.values())


def view_link(experiment: str, view: str) -> str:
    """Return the link to a saved view, relative to the UI."""
    mode = f"&compareRunsMode={VIEWS[view][1]}"
    return f"#/experiments/{experiment}/runs?viewStateShareKey={view}{mode}&workflowType=machine_learning"


def show(client: Any, experiment: str, tags: dict[str, str]) -> None:
    """Set the views and the description of an experiment. A view or description of a user is kept."""
    there = client.get_experiment(experiment).tags
    for name, value in tags.items():
        if there.get(name) != value and (name not in there or is_ours(name, there[name])):
            client.set_experiment_tag(experiment, name, value)
    if OLD_COLOURS in there:
        client.delete_experiment_tag(experiment, OLD_COLOURS)
