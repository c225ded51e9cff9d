"""Write the pictures of docs/img/ from a finished study: MLflow's UI as `pagating ui` shows it, and the report's head.

    python docs/make_screenshots.py studies/NAME [--output docs/img]

The study's MLflow store is expected beside the folder of studies. Needs Chromium and the extra `browser`.
"""

import argparse
import io
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from tune.mlflow_runs import default_uri
from tune.mlflow_views import view_link

LARGEST = 150_000  # bytes of a picture
SIZE = {"width": 1360, "height": 900}
SETTLE_MS = 6000  # charts are drawn after the page has loaded
PATIENCE_S = 120
LISTED = re.compile(r"seed=|Group: ")  # a row of the runs' table
VIEWS = {"mlflow-arms": "arms", "mlflow-curves": "curves", "mlflow-search": "search", "mlflow-trials": "trials"}


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
    """Keep the window once it has settled. Raises ValueError where the file stays too large even in few colours."""
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


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a finished study")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "img")
    given = parser.parse_args()
    study, out = given.study.resolve(), given.output
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not (study / "report.html").is_file():
        sys.exit(f"{study}: no report.html; allowed: the folder of a finished study")
    if chromium is None:
        sys.exit("no Chromium on the PATH (such as Debian's package chromium)")
    client = MlflowClient(tracking_uri=default_uri(study.parent))
    experiment = client.get_experiment_by_name(study.name)
    if experiment is None:
        sys.exit(f"{default_uri(study.parent)}: has no study {study.name}; allowed: a store with its runs")
    number = experiment.experiment_id
    parent = client.search_runs([number], "tags.stage = 'study'", max_results=1)[0].info.run_id
    with served(study.parent) as address, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(viewport=SIZE)
        context.set_default_timeout(1000 * PATIENCE_S)
        page = context.new_page()
        page.goto(address)
        page.get_by_role("link", name=study.name).first.wait_for()
        for name, view in VIEWS.items():
            tab = context.new_page()  # a link of the description opens one: the view is then as it was saved
            tab.goto(f"{address}{view_link(number, view)}")
            tab.get_by_text("viewing a shared view").wait_for()
            tab.get_by_role("row").filter(has_text=LISTED).first.wait_for()
            shoot(tab, out / f"{name}.png")
            tab.close()
        page.goto(f"{address}#/experiments/{number}/runs/{parent}")
        page.get_by_text("Show more").first.click()
        shoot(page, out / "mlflow-study.png")
        page.goto((study / "report.html").as_uri())
        shoot(page, out / "report.png")
        browser.close()


if __name__ == "__main__":
    main()
