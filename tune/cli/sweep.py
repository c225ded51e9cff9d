"""The command `pagating sweep`, which runs a study to its verdict, and the verdict's output, shared with `report`."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis.io.exits import Exit
from tune.cli.common import STUDIES, Config, Output, RequireVerdict, Slots
from tune.cli.ui import ui_command

if TYPE_CHECKING:
    from analysis.report.findings import Findings
    from analysis.verdict.kinds import Result
    from tune.backend.backend import Backend
    from tune.cli.endings import LastLine
    from tune.cli.screen import Screen
    from tune.run.interrupt import Interruption
    from tune.run.study_run import StudyRun
    from tune.study.study import Study

NOTHING_TRAINED = "No search trial could be trained, so there is nothing to compare. The first said"


def sweep(
    config: Config,
    output: Output = STUDIES,
    slots: Slots = None,
    tracking: Annotated[str | None, typer.Option(help="MLflow tracking URI, or 'none'.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Only continue a study; refuse to begin one.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT.")
    ] = None,
    inline: Annotated[
        bool, typer.Option("--inline", help="Train in this process, one trial at a time, without Ray.")
    ] = False,
    require_verdict: RequireVerdict = False,
) -> None:
    """Run a study, or its missing trials, and report the verdict.

    You can interrupt it: the same command continues where it stopped.
    """
    from tune.errors import StudyError
    from tune.study.files import find

    found = find(config, output)
    study, output = found.study, found.output if output == STUDIES else output
    if resume and not (output / study.name / "study.yaml").is_file():
        raise StudyError(f"{output / study.name}: no study was begun here; leave out --resume to begin it")
    # what trains and tracks is imported after these checks, because it takes seconds
    from analysis.io.text import redact
    from tune.backend.inline import Inline
    from tune.backend.ray_backend import RayBackend
    from tune.cli.endings import LastLine, restart
    from tune.cli.screen import Screen
    from tune.run.interrupt import Interruption
    from tune.study.addresses import check_address
    from tune.tracking.check import check_store
    from tune.tracking.store import tracking_uri

    uri = tracking_uri(tracking, study.tracking, output)
    away = None if uri == "none" else check_store(uri)
    typer.echo(f"{study.name}: {study.question}")
    if away:
        typer.echo(
            f"MLflow at {redact(uri)} cannot be used now ({away}). The study goes on, and logs to it when it is back.",
            err=True,
        )
    screen = Screen("" if uri == "none" else ui_command(uri))
    last_line = LastLine()
    with Interruption(screen.say, functools.partial(_last, screen, last_line)) as interruption, last_line.watching():
        where = check_address(address) if address else study.address
        again = restart(screen, last_line)
        backend = Inline() if inline else RayBackend(slots, where, warn=screen.warn, say=screen.say, again=again)
        try:
            code = _run(study, found.base, output, uri, interruption, backend, screen, require_verdict)
        except KeyboardInterrupt:  # no trial was running
            code = None
    if code is None:
        typer.echo("Interrupted. What has ended is kept; the same command continues from there.", err=True)
        sys.stdout.flush()
        os._exit(interruption.exit_code)  # all is done; the libraries' own exits take seconds
    raise typer.Exit(code)


def _last(screen: Screen, last_line: LastLine, line: str) -> None:
    """Print the last line of a process that ends without cleanup."""
    screen.last(line)
    last_line.dismiss()


def _run(
    study: Study,
    base: Path,
    output: Path,
    uri: str,
    interruption: Interruption,
    backend: Backend,
    screen: Screen,
    require_verdict: bool = False,
) -> int | None:
    """Run a study and report it; return its exit code, or None if it was interrupted."""
    from tune import sweep as runner

    run = runner.sweep(
        study,
        base,
        output,
        backend,
        tracking_uri=None if uri == "none" else uri,
        listen=screen.ended,
        interruption=interruption,
        warn=screen.warn,
        watch=screen.watch,
    )
    if not run.stages.finished:
        return None
    return conclude(run, "" if uri == "none" else ui_command(uri), require_verdict)


def conclude(run: StudyRun, browse: str, require_verdict: bool = False) -> int:
    """Report a finished study to the user and to its tracker; return the exit code.

    Args:
        run: The closed run of the study.
        browse: Command that shows the trials; empty if they were not logged.
        require_verdict: Return `Exit.UNDECIDED` if an arm is undecided.
    """
    from analysis.io.text import one_line, redact
    from analysis.verdict.exits import end
    from analysis.verdict.kinds import as_object

    if run.stages.hopeless:
        reason = next(record.reason for record in run.records.values() if record.reason)
        typer.echo(f"{NOTHING_TRAINED}: {one_line(redact(reason))}", err=True)
        return Exit.COULD_NOT
    result = show_verdict(run.study, run.folder, browse)
    if owed := run.tracker.finish(as_object(result)):
        typer.echo(owed, err=True)
    return end(result, require_verdict)


def show_verdict(study: Study, folder: Path, browse: str) -> Result:
    """Write the report of a study, print its verdict and the next steps, and return the verdict."""
    from rich.console import Console

    from analysis.report.build import terminal_table
    from tune.cli.next_steps import next_steps

    found, page = written(study, folder)
    Console().print(terminal_table(found.result))
    for number, step in enumerate(next_steps(found.result, study, str(page), browse), 1):
        typer.echo(f"{number}. {step}")
    return found.result


def written(study: Study, folder: Path) -> tuple[Findings, Path]:
    """Write the report of a study and the cards of its models; return its tables and the path of the report."""
    from analysis.io.study import load
    from analysis.report import build
    from analysis.report.findings import Findings
    from tune.run.models import write_card
    from tune.run.verdicts import shown

    found = Findings(load(folder))
    shown(folder, found.result)
    page = build.write(found, folder)
    for arm in study.arms:
        write_card(study, folder, arm)
    return found, page
