"""The commands for machines without Ray: cells, which writes trials, and take, which records their results."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from analysis.io.exits import Exit
from tune.cli.common import STUDIES, Config, Output, RequireVerdict


def cells(
    config: Config,
    into: Annotated[
        Path | None, typer.Option(help="Folder of cells to write. Default: cells/ in the study's folder.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Cells to write at most.")] = None,
    output: Output = STUDIES,
) -> None:
    """Write the cells of a study that may start now as trials, for machines without Ray.

    Copy the folder to another machine, or leave it here; `python -m pagating.cells FOLDER` trains its cells, and
    `pagating take` records their results. With `trial:` it is `python FOLDER/run.py`, which needs your packages only. A
    search cell trains to its end: early stopping needs a sweep.
    """
    import math

    from pagating.cells.folder import OWN_RUNNER
    from tune import sweep as runner
    from tune.backend.cells import CellWriter
    from tune.study.files import find

    found = find(config, output)
    study, output = found.study, found.output if output == STUDIES else output
    folder = into or output / study.name / "cells"
    writer = CellWriter(folder, limit or math.inf)
    writer.check(study)
    echo = functools.partial(typer.echo, err=True)
    run = runner.sweep(study, found.base, output, writer, warn=echo, say=echo)
    if run.stages.finished:
        typer.echo(f"{study.name} is finished: pagating report {study.name}")
        return
    count = len(writer.cells)
    old = f", {count - writer.new} of them from before" if writer.new < count else ""
    typer.echo(f"{folder}: {count} cells may start now{old}")
    if writer.done:
        typer.echo(f"{writer.done} of them have a result: pagating take {config} {folder}")
    if writer.done == count:
        typer.echo("Nothing more may start before these results are taken.")
        return
    own = (folder / OWN_RUNNER).exists()
    typer.echo(
        f"Train them:  python {folder / OWN_RUNNER}" if own else f"Train them:  python -m pagating.cells {folder}"
    )
    typer.echo(f"Then:        pagating take {config} {folder}")


def take(
    config: Config,
    results: Annotated[Path, typer.Argument(help="Folder of cells, its results/, or the file of one result.")],
    output: Output = STUDIES,
    tracking: Annotated[str | None, typer.Option(help="MLflow tracking URI, or 'none'.")] = None,
    require_verdict: RequireVerdict = False,
) -> None:
    """Check the results of a study's cells and record each once. The last one brings the verdict.

    A wrong or half-written result is refused with its name, and the others are taken.
    """
    from analysis.io.text import redact
    from tune import sweep as runner
    from tune.backend.cells import CellTaker
    from tune.cli.sweep import conclude
    from tune.cli.ui import ui_command
    from tune.errors import StudyError
    from tune.study.files import find
    from tune.tracking.check import check_store
    from tune.tracking.store import tracking_uri

    found = find(config, output)
    study, output = found.study, found.output if output == STUDIES else output
    if not (output / study.name / "ledger.jsonl").is_file():
        raise StudyError(f"{output / study.name}: the study was not begun; `pagating cells {config}` begins it")
    files = _files(results)
    uri = tracking_uri(tracking, study.tracking, output)
    if uri != "none" and (away := check_store(uri)):
        typer.echo(f"MLflow at {redact(uri)} cannot be used now ({away}): pagating sync {study.name} later", err=True)
    taker = CellTaker(files)
    tracked = None if uri == "none" else uri
    run = runner.sweep(
        study, found.base, output, taker, tracking_uri=tracked, warn=lambda line: typer.echo(line, err=True)
    )
    taker.judge_rest(run)
    what = taker.found
    for line in what.refused:
        typer.echo(f"refused: {line}", err=True)
    typer.echo(f"{what.taken} taken, {what.known} already known, {len(what.refused)} refused")
    code: int = Exit.DONE
    if run.stages.finished:
        code = conclude(run, "" if uri == "none" else ui_command(uri), require_verdict)
    else:
        typer.echo(f"{what.left} cells may start now or wait for their results: pagating cells {config}")
    raise typer.Exit(Exit.BAD_INPUT if what.refused else code)


def _files(results: Path) -> list[Path]:
    """Return the files of results that are meant. Raise StudyError if there is none."""
    from tune.errors import StudyError

    if results.is_file():
        return [results]
    folder = results / "results" if (results / "results").is_dir() else results
    if not folder.is_dir():
        raise StudyError(f"{results}: no such file or folder; give a folder of cells, its results/, or one result")
    if folder.name != "results" and not (folder / "cells.json").exists():
        found = sorted(folder.glob("*.json"))
        if not found:
            raise StudyError(f"{results}: has no results; give a folder of cells, its results/, or one result")
        return found
    return sorted(folder.glob("*.json")) if folder.name == "results" else []
