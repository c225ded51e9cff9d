"""MLflow's web server with a first page that suits a study; `pagating ui` serves it (MLflow's option `--app-name`).

MLflow 3 opens on pages for agents, with an assistant over a third of the window. It lists a hundred runs, without
their hyperparameters, and gives groups colours by chance. All but the hundred is kept in the browser's own storage, so
the page sets it there, once: whoever chooses otherwise keeps what they chose.

MLflow 3 has no setting for any of this. A link can name the workflow (`?workflowType=`) and a saved view. No
environment variable, option or tag sets the columns of a first visit, the colours of groups, the assistant or the
number of runs. A server app, named by the entry point `mlflow.app`, is MLflow's own way to change its server.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from flask import request
from mlflow import MlflowClient
from mlflow.server import app as flask_app
from mlflow.server.fastapi_app import app

from tune.tracking.views import ARM_COLOURS, PAGE, VIEW

LISTED = 200  # experiments whose columns are set, the latest
AT_ONCE = 1000  # runs; a mean over an arm's first runs alone would not be the arm's
GROUP_COLOURS = "experimentRunColors"
SETTINGS: dict[str, Any] = {
    "mlflow.workflowType_v1": "machine_learning",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True,
    "mlflow.assistant.panelOpen_v1": False,
}
SCRIPT = """<script>
const [once, colours, entry] = %s;
for (const [name, value] of Object.entries(once))
  if (localStorage.getItem(name) === null) localStorage.setItem(name, JSON.stringify(value));
localStorage.setItem(entry, JSON.stringify({...colours, ...JSON.parse(localStorage.getItem(entry) ?? "{}")}));
if (location.hash === "" || location.hash === "#/") location.replace("#/experiments");
</script>"""


def settings(client: MlflowClient) -> tuple[dict[str, Any], dict[str, str]]:
    """What a browser that has never been here is given: values by the name of their entry, colours by group."""
    found, colours = dict(SETTINGS), dict[str, str]()
    studies = client.search_experiments(max_results=LISTED, order_by=["last_update_time DESC"])
    for experiment in studies:
        saved = experiment.tags.get(f"{VIEW}trials")
        if saved:
            page = f'MLflowLocalStorage-1.1-ExperimentPage-["{experiment.experiment_id}"]-ReactComponentState'
            found[page] = json.loads(json.loads(saved)["state"])
        colours = json.loads(experiment.tags.get(ARM_COLOURS, "{}")) | colours
    return found, colours


def with_settings(page: str, found: dict[str, Any], colours: dict[str, str]) -> str:
    """MLflow's page with a script, before its own ones, that gives the browser `settings`. Raises ValueError."""
    if "<head>" not in page:
        raise ValueError("MLflow's page has no <head>: `mlflow ui` serves it as it is")
    safe = json.dumps([found, colours, GROUP_COLOURS]).replace("<", "\\u003c")  # no text of a study may end the script
    return page.replace("<head>", f"<head>{SCRIPT % safe}", 1)


def first_page() -> HTMLResponse:
    """The page that all of the UI runs in."""
    page = (Path(str(flask_app.static_folder)) / "index.html").read_text(encoding="utf-8")
    client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_BACKEND_STORE_URI"))
    return HTMLResponse(with_settings(page, *settings(client)), headers={"Cache-Control": "no-cache"})


def all_at_once() -> None:
    """Let the runs page, which asks for `PAGE` runs, have `AT_ONCE`."""
    if request.path.startswith("/ajax-api/") and request.path.endswith("/mlflow/runs/search"):
        asked = request.get_json(silent=True)  # kept by the request: its handler reads the same object
        if isinstance(asked, dict) and asked.get("max_results") == PAGE:
            asked["max_results"] = AT_ONCE


flask_app.before_request(all_at_once)
app.router.routes.insert(0, APIRoute("/", first_page))
