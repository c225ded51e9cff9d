"""Take the pictures of docs/img/ of a finished study: MLflow's UI as `pagating ui` shows it, and the report's head.

    python docs/make_screenshots.py studies/NAME [--output docs/img]

The study's MLflow store must be beside the folder of studies. This needs Chromium and the extra `browser`.
"""

import argparse
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from tune.study.files import load
from tune.tracking.store import tracking_uri
from tune.tracking.views import view_link

LARGEST = 150_000  # bytes of a picture
SETTLE_MS = 6000  # charts are drawn after the page has loaded
PATIENCE_S = 120
LISTED = re.compile(r"seed=|Group: ")  # a row of the runs' table
SIZES = {  # px of the window, in which nothing of a study of eight arms is cut
    "mlflow-trials": (1400, 918),
    "mlflow-arms": (1400, 700),
    "mlflow-curves": (1360, 900),
    "mlflow-search": (1360, 916),
    "mlflow-study": (1360, 912),
    "mlflow-report": (1600, 930),
    "mlflow-models": (1600, 640),
    "mlflow-stopped": (1360, 745),
    "mlflow-compare": (1360, 900),
    "report": (1360, 780),
}
VIEWS = {"mlflow-trials": "trials", "mlflow-curves": "curves", "mlflow-search": "search"}


@contextmanager
def served(studies: Path) -> Iterator[str]:
    """The address of `pagating ui` on the store of a folder of studies, while it is needed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tune.cli", "ui", "--output", str(studies), "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()
            server.wait()


def _wait(address: str, server: subprocess.Popen, log) -> None:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            if server.poll() is not None:
                break
            time.sleep(0.5)
    log.seek(0)
    raise RuntimeError(f"pagating ui does not answer at {address}:\n{log.read().decode()}")


def shoot(page: Page, path: Path) -> None:
    """Keep the window, in its picture's size, once it has settled. Raises ValueError where the file stays too large."""
    width, height = SIZES[path.stem]
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_timeout(SETTLE_MS)
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.save(path, optimize=True)
    if path.stat().st_size > LARGEST:
        # half for what covers the page, to the bit; half spread over what the charts have besides
        most = sorted(image.getcolors(image.width * image.height), reverse=True)[:128]
        spread = image.quantize(128, Image.Quantize.MAXCOVERAGE).getpalette()
        palette = Image.new("P", (1, 1))
        palette.putpalette([channel for _, colour in most for channel in colour] + spread)
        image.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path} has {size} bytes; at most {LARGEST}")
    print(f"{path} {size}")


def run_pages(study: Path, wanted: Collection[str]) -> dict[str, tuple[str, str]]:
    """For each wanted picture the link within the UI, and words that its page shows once it is there."""
    client = MlflowClient(tracking_uri=tracking_uri(None, None, study.parent))
    experiment = client.get_experiment_by_name(study.name)
    if experiment is None:
        sys.exit(f"{tracking_uri(None, None, study.parent)}: has no study {study.name}; allowed: a store with its runs")
    number = experiment.experiment_id

    def first(wanted: str, order: str = "attributes.start_time") -> Run:
        found = client.search_runs([number], wanted, order_by=[order], max_results=1)
        if not found:
            sys.exit(f"{study}: no run with {wanted}; allowed: a study with one, as a picture shows it")
        return found[0]

    parent = first("tags.stage = 'study'").info.run_id
    stopped = "mlflow-stopped" in wanted and first("tags.outcome = 'stopped_early'").info.run_id
    baseline = load(study / "study.yaml").baseline
    best = first(f"tags.stage = 'confirm' and tags.arm != '{baseline}'", "metrics.`val_nll`")
    seed = best.data.tags["seed"]
    base = first(f"tags.stage = 'confirm' and tags.arm = '{baseline}' and tags.seed = '{seed}'")
    compared = quote(json.dumps([base.info.run_id, best.info.run_id]))
    home = f"#/experiments/{number}"
    found = {name: (view_link(number, view), "viewing a shared view") for name, view in VIEWS.items()} | {
        "mlflow-arms": (home, "Group: "),
        "mlflow-study": (f"{home}/runs/{parent}", "About this run"),
        "mlflow-report": (f"{home}/runs/{parent}/artifacts/report.html", "report.html"),
        "mlflow-models": (f"{home}/models", "paglu|gelu"),
        "mlflow-stopped": (f"{home}/runs/{stopped}", "About this run"),
        "mlflow-compare": (f"#/compare-runs?runs={compared}&experiments={quote(json.dumps([number]))}", "Comparing 2"),
    }
    return {name: page for name, page in found.items() if name in wanted}


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a finished study")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "img")
    parser.add_argument(
        "--only", nargs="+", choices=sorted(SIZES), default=sorted(SIZES), help="these pictures; all without it"
    )
    given = parser.parse_args()
    study, out = given.study.resolve(), given.output
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not (study / "report.html").is_file():
        sys.exit(f"{study}: no report.html; allowed: the folder of a finished study")
    if chromium is None:
        sys.exit("no Chromium on the PATH (such as Debian's package chromium)")
    pages = run_pages(study, given.only)
    with served(study.parent) as address, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1480, "height": 900})
        context.set_default_timeout(1000 * PATIENCE_S)
        page = context.new_page()
        page.goto(address)
        page.get_by_role("link", name=study.name).first.wait_for()
        for name, (link, there) in pages.items():
            tab = context.new_page()  # a link of the description opens one: a view is then as it was saved
            tab.goto(f"{address}{link}")
            tab.get_by_text(re.compile(there)).first.wait_for()
            if name in VIEWS:
                tab.get_by_role("row").filter(has_text=LISTED).first.wait_for()
            if name == "mlflow-study":
                tab.get_by_text("Show more").first.click()
            if name == "mlflow-report":  # a path of this machine says nothing to a reader
                tab.get_by_text(re.compile("^Path: ?")).last.evaluate("line => line.parentElement.style.opacity = 0")
            if name == "mlflow-models":  # the column of runs as wide as their names
                source = tab.locator(".ag-header-cell").filter(has_text="Source run")
                source.locator(".ag-header-cell-resize").dblclick()
            shoot(tab, out / f"{name}.png")
            tab.close()
        if "report" in given.only:
            page.goto((study / "report.html").as_uri())
            shoot(page, out / "report.png")
        browser.close()


if __name__ == "__main__":
    main()
