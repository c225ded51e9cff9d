"""Share small studies that were run and logged as by a user, their UI and a browser."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.own_trainings import DEPTHS, NAMED
from tune.run import ledger

# Whoever searches a learning rate of 100 diverges; of an arm's other trials the worse half is stopped early
STUDY = """\
name: seen
question: Does a gate that learns lower the loss?
tokenizer: {vocab_size: 300}
model: {n_layer: 1, d_model: 16, n_head: 2, n_ctx: 32}
fixed: {tokens: 20_480, batch_tokens: 512, eval_windows: 16}
nuisance: {lr: {choice: [2.0e-3, 5.0e-3, 1.0e-2, 2.0e-2, 4.0e-2, 100.0]}}
arms:
  gelu: {baseline: true}
  linear-floor: {gate: sigmoid, alpha: 0.0, floor: true}
  paglu-searched: {gate: sigmoid, alpha: {search: {uniform: [0.0, 2.0]}}}
  paglu-learnable: {gate: sigmoid, alpha: {learnable: {init: 0.5, per: layer}}}
search: {trials_per_arm: 6}
calibrate: {points: 3, seeds: 1, max_points: 3}
confirm: {seeds: 3}
"""
LADDER = """\
name: steps
question: Does the gate last as the model grows?
tokenizer: {vocab_size: 300}
model: {n_head: 2, n_ctx: 32}
fixed: {batch_tokens: 512, eval_windows: 16}
nuisance: {lr: {loguniform: [2.0e-3, 5.0e-2]}}
arms:
  gelu: {baseline: true}
  paglu-learnable: {gate: sigmoid, alpha: {learnable: {init: 0.5, per: layer}}}
search: {trials_per_arm: 2}
calibrate: {points: 3, seeds: 1, max_points: 3}
confirm: {seeds: 3}
scales:
  - {d_model: 8, n_layer: 1, tokens: 10_240}
  - {d_model: 16, n_layer: 2, tokens: 20_480}
"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGATING = [sys.executable, "-m", "tune.cli"]


@pytest.fixture(scope="session")
def browser():
    """Start Chromium without a window; skip the tests if it or Playwright is missing."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs the extra browser (pip install -e '.[browser]')"
    )
    if CHROMIUM is None:
        pytest.skip("needs Chromium (such as Debian's package chromium)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def study(browser, tmp_path_factory):
    """Run studies with `pagating sweep` and log them in the store beside their folder; return the first one's folder.

    The experiments 1 to 3 are a study of the built-in model, one of the user's own function, and a ladder, which has an
    arm of the first study in another colour. For work on the tests, `PAGATING_UI_STUDY` may name the first study of an
    earlier run.
    """
    if there := os.environ.get("PAGATING_UI_STUDY"):
        return Path(there)
    home = tmp_path_factory.mktemp("home")
    (home / "mine.py").write_text(DEPTHS)
    texts = {"seen": STUDY, "own": yaml.safe_dump(NAMED, sort_keys=False), "steps": LADDER}
    for name, text in texts.items():
        (home / f"{name}.yaml").write_text(text)
        done = subprocess.run(
            [*PAGATING, "sweep", f"{name}.yaml", "--slots", "2"],
            cwd=home,
            env={**os.environ, "PAGATING_CACHE": str(home / "cache")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 1), done.stdout + done.stderr
        assert (home / "mlflow.db").is_file(), done.stdout + done.stderr
    return home / "studies" / "seen"


@pytest.fixture(scope="session")
def records(study):
    """Return the cells of the study."""
    return list(ledger.records(ledger.read(study / "ledger.jsonl")).values())


@pytest.fixture(scope="session")
def verdict(study):
    """Return the study's verdict.json."""
    return json.loads((study / "verdict.json").read_text())


@pytest.fixture(scope="session")
def address(study):
    """Serve the study's store with `pagating ui`; yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page, log = f"http://127.0.0.1:{port}/", study.parents[1] / "ui.log"
    command = [*PAGATING, "ui", "--output", str(study.parent), "--port", str(port)]
    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{page}health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, log.read_text()
                time.sleep(0.5)
        yield page
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="session")
def context(browser):
    """Open a window of a desktop's size, which keeps the pages' scripts, as they take seconds to load."""
    opened = browser.new_context(viewport={"width": 1440, "height": 900})
    opened.set_default_timeout(30_000)
    yield opened
    opened.close()


@pytest.fixture
def page(context, request):
    """Open a page of a browser that has stored nothing, also nothing of an earlier test.

    If `PAGATING_SHOTS` names a folder, keep there a picture of each tab at the end of the test.
    """
    opened = context.new_page()
    yield opened
    for place, tab in enumerate(context.pages):
        if folder := os.environ.get("PAGATING_SHOTS"):
            tab.screenshot(path=Path(folder) / f"{request.node.name}-{place}.png")
        origin = tab.evaluate("location.origin")
        if origin.startswith("http"):
            known = {"origin": origin, "storageTypes": "cookies,local_storage,indexeddb,cache_storage,service_workers"}
            context.new_cdp_session(tab).send("Storage.clearDataForOrigin", known)
        tab.close()
