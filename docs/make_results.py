"""Publish a finished study under docs/results/, and write every published page from its tables.

    python docs/make_results.py studies/NAME --name NAME --source "the corpus, and where to get it"
    python docs/make_results.py                  # without a study: write all published pages again

A published study is small and names no machine: paths, hosts and user names are left out or refused.
"""

import argparse
import getpass
import hashlib
import json
import os
import platform
import re
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.io import formats
from analysis.io.study import load
from analysis.published import index
from analysis.published import page as results_page
from analysis.report.figures import drawn
from analysis.report.findings import Findings
from analysis.verdict.kinds import as_object

RESULTS = Path(__file__).parent / "results"
OF_A_MACHINE = ("tracking", "address", "storage")  # keys of a study that say where it ran, not what it was
ANALYSIS = ("numpy", "pandas", "scipy")
PILOT_MARKS = ("<!-- pilots.csv: start -->\n", "<!-- pilots.csv: end -->\n")
README_MARKS = ("<!-- docs/make_results.py: start -->\n", "<!-- docs/make_results.py: end -->\n")
ABSOLUTE = re.compile(r"(?<![\w.:/~])(?:/(?:[\w.+-]+/)+[\w.+-]*|[A-Za-z]:\\[\w\\.]+)")


class PublishError(ValueError):
    """A study that cannot be published; the message names the file and the value in one line."""


def publish(study: Path, target: Path, **said: str | None) -> None:
    """Copy study.yaml, provenance.json and the tables of a finished study into `target`.

    Args:
        study: the folder of the study.
        target: the folder of the published study.
        said: `source`, `command`, `note` and `follows`, which no file of the study has.

    Raises: PublishError if the study is unfinished or a value in it names this machine.
    """
    if not (study / "verdict.json").is_file():
        raise PublishError(f"{study}: has no verdict.json; allowed: a finished study")
    settings = yaml.safe_load((study / "study.yaml").read_text(encoding="utf-8")) | {"name": target.name}
    came = json.loads((study / "provenance.json").read_text(encoding="utf-8"))
    came["files_sha256"] = _portable(settings)
    came["analysis"] = {name: version(name) for name in ANALYSIS} | {"python": platform.python_version()}
    times = [event["time"] for event in _events(study) if "time" in event]
    came["wall_seconds"] = round(times[-1] - times[0]) if times else None
    came |= {key: value for key, value in said.items() if value is not None}
    target.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    if said.get("source"):
        text = f"# corpus: {said['source']}\n" + text
    written = {"study.yaml": text, "provenance.json": json.dumps(came, indent=1, sort_keys=True) + "\n"}
    for name, content in written.items():
        _refuse_machine(f"{study / name}", content)
        (target / name).write_text(content, encoding="utf-8")
    for name in ("trials.parquet", "curves.parquet", "layers.parquet"):
        if name == "layers.parquet" and not (study / name).exists():  # no model was kept
            continue
        table = pd.read_parquet(study / name)
        for column in table.select_dtypes(exclude="number").columns:
            for value in table[column].dropna().unique():
                _refuse_machine(f"{study / name}, column {column}", str(value))
        table.to_parquet(target / name, compression="zstd", index=False)


def _events(study: Path) -> list[dict[str, Any]]:
    with (study / "ledger.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _portable(settings: dict[str, Any]) -> dict[str, str]:
    """Remove the machine from a study's settings, in place; return the SHA-256 of each corpus file by its new name."""
    for key in OF_A_MACHINE:
        settings.pop(key, None)
    digests = {}
    files = (settings.get("corpus") or {}).get("files") or {}
    for split in ("train", "validation", "test"):
        given = files.get(split)
        for path in [given] if isinstance(given, str) else given or []:
            digests[_short(path)] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if given:
            files[split] = _short(given) if isinstance(given, str) else [_short(path) for path in given]
    tokenizer = settings.get("tokenizer") or {}
    if tokenizer.get("path"):
        tokenizer["path"] = Path(tokenizer["path"]).name
    return digests


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def _refuse_machine(what: str, text: str) -> None:
    own = [str(Path.home()), os.getcwd(), socket.gethostname(), getpass.getuser()]
    for word in own:
        if len(word) > 1 and re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text):
            raise PublishError(f"{what}: speaks of this machine: {word!r} in {text[:200]!r}")
    if found := ABSOLUTE.search(re.sub(r"https://\S+", "", text)):
        raise PublishError(f"{what}: has the path {found[0]!r}; allowed: none of a machine")


def write_page(folder: Path, draw_figures: bool = True) -> None:
    """Write verdict.json, README.md and figures/ of a published study from its tables."""
    found = Findings(load(folder))
    result, shown = found.result, drawn(found, published=True)
    for each in (result, *(rung.result for rung in result.rungs)):  # not those of the machine that writes the page
        each.versions = (found.study.settings.get("provenance") or {}).get("analysis") or {}
    (folder / "verdict.json").write_text(formats.to_json(as_object(result)) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(results_page.page(found, shown), encoding="utf-8")
    if draw_figures:
        (folder / "figures").mkdir(exist_ok=True)
        for name, figure in shown.items():
            (folder / "figures" / f"{name}.svg").write_text(results_page.svg(figure.plot, name), encoding="utf-8")


def published(results: Path) -> list[Path]:
    """Return the folders of the published studies."""
    return sorted(file.parent for file in results.glob("*/trials.parquet"))


def write_pilots(results: Path) -> None:
    """Write the table of pilots.csv into LOG.md, between its two marks."""
    if (results / "LOG.md").is_file():
        table = index.pilots(pd.read_csv(results / "pilots.csv"))
        _between(results / "LOG.md", PILOT_MARKS, table + "\n")


def _between(page: Path, marks: tuple[str, str], text: str) -> None:
    begin, end = marks
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def write_all(results: Path) -> None:
    """Write every page, the pages over all studies and the README's table."""
    write_pilots(results)
    folders = published(results)
    for folder in folders:
        write_page(folder)
    studies = [load(folder) for folder in folders]
    for name, text in index.pages(studies, results).items():
        (results / name).write_text(text, encoding="utf-8")
    readme = results.parents[1] / "README.md"
    if readme.is_file():
        _between(readme, README_MARKS, index.readme_block(studies))


def main() -> None:
    """Run the command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("study", nargs="?", type=Path, help="the folder of a finished study")
    p.add_argument("--name", help="its name under docs/results/ (default: the study's folder)")
    p.add_argument("--source", help="what the corpus is and where to get it")
    p.add_argument("--command", help="the command that ran the study")
    p.add_argument("--note", help="a sentence for the reader, such as what else the machine did")
    p.add_argument("--follows", metavar="NAME", help="the published study that this one follows up")
    p.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = p.parse_args()
    if options.study is not None:
        name = options.name or options.study.resolve().name
        said = {key: getattr(options, key) for key in ("source", "command", "note", "follows")}
        try:
            publish(options.study, options.results / name, **said)
        except PublishError as error:
            p.error(str(error))
    write_all(options.results)


if __name__ == "__main__":
    main()
