"""MLflow's web server with a first page that suits a study; `pagating ui` serves it (MLflow's option `--app-name`).

MLflow 3 opens on pages for agents, with an assistant over a third of the window, and lists runs without their
hyperparameters. All of that is kept in the browser's own storage, so the page sets it there, once: whoever chooses
otherwise keeps what they chose.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from mlflow.server import app as flask_app
from mlflow.server.fastapi_app import app
from mlflow.server.handlers import _get_tracking_store

from tune.mlflow_views import VIEW

LISTED = 200  # experiments whose columns are set, the latest
SETTINGS: dict[str, Any] = {
    "mlflow.workflowType_v1": "machine_learning",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True,
    "mlflow.assistant.panelOpen_v1": False,
}
SCRIPT = """<script>
for (const [name, value] of Object.entries(%s))
  if (localStorage.getItem(name) === null) localStorage.setItem(name, JSON.stringify(value));
if (location.hash === "" || location.hash === "#/") location.replace("#/experiments");
</script>"""


def settings() -> dict[str, Any]:
    """What a browser that has never been here is given, by the name of its storage's entry."""
    found = dict(SETTINGS)
    for experiment in _get_tracking_store().search_experiments(max_results=LISTED):
        saved = experiment.tags.get(f"{VIEW}trials")
        if saved:
            page = f'MLflowLocalStorage-1.1-ExperimentPage-["{experiment.experiment_id}"]-ReactComponentState'
            found[page] = json.loads(json.loads(saved)["state"])
    return found


def with_settings(page: str, found: dict[str, Any]) -> str:
    """MLflow's page with a script, before its own ones, that gives the browser `found`. Raises ValueError."""
    if "<head>" not in page:
        raise ValueError("MLflow's page has no <head>: `mlflow ui` serves it as it is")
    safe = json.dumps(found).replace("<", "\\u003c")  # no text of a study may end the script
    return page.replace("<head>", f"<head>{SCRIPT % safe}", 1)


def first_page() -> HTMLResponse:
    """The page that all of the UI runs in."""
    page = (Path(str(flask_app.static_folder)) / "index.html").read_text(encoding="utf-8")
    return HTMLResponse(with_settings(page, settings()), headers={"Cache-Control": "no-cache"})


app.router.routes.insert(0, APIRoute("/", first_page))
