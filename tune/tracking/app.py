"""MLflow's web server with settings that suit a study. `pagating ui` serves it (MLflow's option `--app-name`).

MLflow 3 opens pages for agents, with an assistant over a third of the window. It lists only a hundred runs, without
their hyperparameters, and assigns random colours to groups. Except for the hundred, these settings are in the browser's
storage. The page sets them there once, so a user's own choices are kept. Only the view that a study opens on is set
once more, when the study has its verdict. MLflow's menu Views opens every saved view as a table, because only the
address of a page says whether it shows charts. The page adds that to the address.

MLflow 3 has no setting for any of this. A link can name the workflow (`?workflowType=`) and a saved view. No
environment variable, option or tag sets the columns of a first visit, the colours of groups, the assistant or the
number of runs. A server app, named by the entry point `mlflow.app`, is MLflow's own way to change its server.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from flask import request
from mlflow import MlflowClient
from mlflow.server import app as flask_app
from mlflow.server.fastapi_app import app

from tune.tracking.views import ARM_COLOURS, OPENS, PAGE, VIEW, VIEWS

LISTED = 200  # number of latest experiments whose columns are set
AT_ONCE = 1000  # number of runs to load, so that an arm's mean is taken over all of its runs
GROUP_COLOURS = "experimentRunColors"
SETTINGS: dict[str, Any] = {
    "mlflow.workflowType_v1": "machine_learning",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True,
    "mlflow.assistant.panelOpen_v1": False,
}
SCRIPT = r"""<script>
const [once, pages, colours, entry, modes] = %s;
for (const [name, value] of Object.entries(once))
  if (localStorage.getItem(name) === null) localStorage.setItem(name, JSON.stringify(value));
for (const [name, [view, state]] of Object.entries(pages))
  if (localStorage.getItem(name) === null || (view !== "trials" && localStorage.getItem(`pagating.${name}`) !== view)) {
    localStorage.setItem(name, JSON.stringify(state));
    localStorage.setItem(`pagating.${name}`, view);
  }
const stored = (name) => JSON.parse(localStorage.getItem(name) ?? "{}");
const store = (own) => {  // the colours of groups that no user has changed
  const [now, set] = [stored(entry), stored("pagating.colours")];
  for (const [group, colour] of Object.entries(own))
    if (!(group in now) || now[group] === set[group]) now[group] = set[group] = colour;
  localStorage.setItem(entry, JSON.stringify(now));
  localStorage.setItem("pagating.colours", JSON.stringify(set));
  return now;
};
const here = () => colours[location.hash.match(/experiments\/(\d+)/)?.[1]] ?? {};
Object.values(colours).forEach(store);
const read = store(here());  // by MLflow, once, when its page starts
const paint = () => {
  const own = here(), now = store(own);
  if (Object.keys(own).some((group) => now[group] !== read[group])) location.reload();
};
addEventListener("hashchange", paint);
if (location.hash === "" || location.hash === "#/") location.replace("#/experiments");
let last = null, tries = 0;
const chart = () => {
  const [path, query] = location.hash.split("?"), asked = new URLSearchParams(query);
  const view = asked.get("viewStateShareKey");
  if (view !== last) [last, tries] = [view, 0];
  if (view in modes && !asked.has("compareRunsMode") && tries++ < 5) {
    asked.set("compareRunsMode", modes[view]);
    location.replace(`${path}?${asked}`);
  }
};
for (const name of ["pushState", "replaceState"]) {
  const real = history[name];
  history[name] = function (...given) { real.apply(this, given); paint(); setTimeout(chart); };
}
</script>"""


@dataclass
class Settings:
    """What a browser without any settings stores.

    Attributes:
        pages: View that each study opens on, and its state, by name of the storage entry.
        colours: Colours by group, by id of the experiment. Two studies may give an arm of one name two colours.
    """

    pages: dict[str, tuple[str, Any]]
    colours: dict[str, dict[str, str]]


def settings(client: MlflowClient) -> Settings:
    """Return the settings of the latest studies in a store."""
    found = Settings({}, {})
    for experiment in client.search_experiments(max_results=LISTED, order_by=["last_update_time DESC"]):
        view = experiment.tags.get(OPENS, "trials")
        if saved := experiment.tags.get(f"{VIEW}{view}"):
            page = f'MLflowLocalStorage-1.1-ExperimentPage-["{experiment.experiment_id}"]-ReactComponentState'
            found.pages[page] = view, json.loads(json.loads(saved)["state"])
        found.colours[experiment.experiment_id] = json.loads(experiment.tags.get(ARM_COLOURS, "{}"))
    return found


def with_settings(page: str, found: Settings) -> str:
    """Insert a script that stores the settings, before the other scripts of MLflow's page.

    Args:
        page: HTML of the page.
        found: The settings.

    Raises:
        ValueError: The page has no `<head>`.
    """
    if "<head>" not in page:
        raise ValueError("MLflow's page has no <head>: `mlflow ui` serves it unchanged")
    modes = {view: mode for view, (_, mode) in VIEWS.items()}
    stored = json.dumps([SETTINGS, found.pages, found.colours, GROUP_COLOURS, modes])
    safe = stored.replace("<", "\\u003c")  # a study's text cannot end the script
    return page.replace("<head>", f"<head>{SCRIPT % safe}", 1)


def first_page() -> HTMLResponse:
    """Return the page that contains the whole UI."""
    page = (Path(str(flask_app.static_folder)) / "index.html").read_text(encoding="utf-8")
    client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_BACKEND_STORE_URI"))
    return HTMLResponse(with_settings(page, settings(client)), headers={"Cache-Control": "no-cache"})


def all_at_once() -> None:
    """Return `AT_ONCE` runs to the runs page, which requests only `PAGE`."""
    if request.path.startswith("/ajax-api/") and request.path.endswith("/mlflow/runs/search"):
        asked = request.get_json(silent=True)  # cached in the request: the handler reads the same object
        if isinstance(asked, dict) and asked.get("max_results") == PAGE:
            asked["max_results"] = AT_ONCE


flask_app.before_request(all_at_once)
app.router.routes.insert(0, APIRoute("/", first_page))
