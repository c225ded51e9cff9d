"""The commands for a study that has begun: status, report, sync, repair and trial."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis.io.exits import Exit
from tune.cli.common import Name, Names, Output, RequireVerdict, begun_folder, study_folder
from tune.cli.sweep import show_verdict
from tune.cli.ui import browse

if TYPE_CHECKING:
    from analysis.report.findings import Findings


def report(
    studies: Names,
    output: Output = Path("studies"),
    into: Annotated[
        Path | None, typer.Option(help="Page of several studies. Default: report.html in --output.")
    ] = None,
    require_verdict: RequireVerdict = False,
) -> None:
    """Rebuild the tables, the verdict and the report of studies from their ledgers. Several get a page of all, too.

    The report of a published study, which has no ledger, is made from its tables.
    """
    from analysis.report.build import several
    from analysis.verdict.exits import end
    from tune.errors import StudyError

    folders = list({folder.resolve(): folder for folder in (study_folder(name, output) for name in studies)}.values())
    if into and len(folders) == 1:
        raise StudyError(f"--into {into}: is the page of several studies; name more than one")
    found: dict[Path, Findings] = {}
    for folder in folders:
        found[folder / "report.html"] = _rebuilt(folder)
    if len(folders) > 1:
        page = into or output / "report.html"
        if not page.parent.is_dir():
            raise StudyError(f"{page.parent}: no such folder; --into names the page of several studies")
        typer.echo(f"All studies: {several(found, page)}")
    raise typer.Exit(max(end(each.result, require_verdict) for each in found.values()))


def _rebuilt(folder: Path) -> Findings:
    """Write the tables and the report of a study, and print its verdict."""
    from tune.run import ledger, provenance, tables
    from tune.run.kept import measured
    from tune.study.files import load

    loaded = load(folder / "study.yaml")
    if (folder / "ledger.jsonl").exists() or not (folder / "trials.parquet").exists():
        events = ledger.read(folder / "ledger.jsonl") if (folder / "ledger.jsonl").exists() else []
        if all(record.outcome is None for record in ledger.records(events).values()):
            typer.echo(f"unfinished: no trial of {folder} has ended yet", err=True)
            raise typer.Exit(Exit.COULD_NOT)
        tables.write_tables(loaded.name, events, folder, loaded)
        measured.write_measured(loaded, folder, ledger.records(events).values())
        provenance.renew_check(folder, events)
    return show_verdict(loaded, folder, browse(loaded, folder.parent))


def sync(
    study: Name,
    output: Output = Path("studies"),
    tracking: Annotated[str | None, typer.Option(help="MLflow tracking URI.")] = None,
) -> None:
    """Send those cells of a study's ledger to MLflow that it lacks, which may be all of them."""
    from analysis.io.text import redact
    from tune.errors import StudyError
    from tune.study.files import load
    from tune.tracking import tracker
    from tune.tracking.check import check_store
    from tune.tracking.store import tracking_uri

    folder = begun_folder(study, output)
    loaded = load(folder / "study.yaml")
    uri = tracking_uri(tracking, loaded.tracking, folder.parent)
    if uri == "none":
        raise StudyError("tracking 'none': no store to fill; name one with --tracking")
    check_store(uri)
    cells, written = tracker.sync(uri, loaded, folder)
    typer.echo(f"MLflow at {redact(uri)} has all {cells} cells of {loaded.name}; {written} were written now.")


def repair(study: Name, output: Output = Path("studies")) -> None:
    """Rewrite a damaged ledger with its undamaged lines. The next sweep trains the lost cells again.

    The damaged file is kept beside the ledger.
    """
    from tune.run import repair as repairs
    from tune.study.files import load

    folder = begun_folder(study, output)
    typer.echo(repairs.repair(load(folder / "study.yaml"), folder))


def status(
    study: Name,
    output: Output = Path("studies"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print the progress of a study, also while it runs."""
    from rich.console import Console

    from tune.cli.folders import standing_object
    from tune.cli.status_table import as_object, look
    from tune.run.standing import standing
    from tune.run.verdicts import shown
    from tune.study.files import load

    folder = study_folder(study, output)
    if not (folder / "ledger.jsonl").exists():
        found = standing(folder)
        said = f"{found.name}: {found.state}. {found.problem or found.summary}".rstrip()
        typer.echo(json.dumps(standing_object(found)) if as_json else said)
        return
    view = look(load(folder / "study.yaml"), folder)
    if as_json:
        typer.echo(json.dumps({**standing_object(standing(folder)), **as_object(view)}))
        return
    if view.concluded:
        shown(folder)
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200  # no path is broken in a pipe
    Console(highlight=False, width=width).print(view)


def trial(
    study: Name,
    cell: Annotated[str | None, typer.Argument(help="Key of a cell. Without it, list the cells.")] = None,
    output: Output = Path("studies"),
) -> None:
    """Print a cell as a trial.json, which `pagating train` runs without Ray."""
    from dataclasses import asdict

    from tune.errors import StudyError
    from tune.run import ledger
    from tune.study.files import load
    from tune.study.inputs import begun
    from tune.study.own_study import OwnStudy
    from tune.subject.gpt2 import Gpt2
    from tune.subject.short import subject_of
    from tune.subject.sources import draft

    folder = begun_folder(study, output)
    events = ledger.read(folder / "ledger.jsonl")
    found, loaded = ledger.records(events), load(folder / "study.yaml")
    if cell is None:
        for key, record in found.items():
            loss = record.final.get("val_nll")
            shown = "" if loss is None else loaded.sign * loss
            typer.echo(f"{key}\t{record.outcome or 'not ended'}\t{shown}")
        return
    if cell not in found:
        raise StudyError(f"{folder}: no cell '{cell}'; `pagating trial {study}` lists them")
    mine = found[cell].cell
    if isinstance(loaded, OwnStudy):
        own = subject_of(loaded, draft(loaded, folder, folder).write())
        own.check_begun(events[0])
        typer.echo(json.dumps(asdict(own.trial(mine)), indent=1))
        return
    digest = next(event["corpus"] for event in events if event["event"] == "study")
    typer.echo(json.dumps(Gpt2(loaded, begun(loaded, folder, digest)).trial(mine).as_dict(), indent=1))
