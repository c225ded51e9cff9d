"""The command `pagating sweep`, which runs a study to its verdict, and the verdict's output, shared with `report`."""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis.io.exits import Exit
from tune.cli.common import STUDIES, Config, Output, RequireVerdict, Slots, seconds_of
from tune.cli.ui import ui_command

if TYPE_CHECKING:
    from analysis.report.findings import Findings
    from tune.backend.backend import Backend
    from tune.cli.endings import LastLine, State
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
    packed: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="K",
            help="Train up to K trials of one shape together in this process, without Ray. It pays on a GPU.",
        ),
    ] = None,
    require_verdict: RequireVerdict = False,
    time_budget: Annotated[
        str | None, typer.Option(help="Stop in good order after this time, such as 2h or 90m; exit with 1.")
    ] = None,
    then: Annotated[
        str | None,
        typer.Option(
            help="Shell command that runs when the sweep has ended by itself. It reads PAGATING_STUDY, "
            "PAGATING_FOLDER, PAGATING_STATE (finished, unfinished, failed) and PAGATING_EXIT."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON per event.")] = False,
) -> None:
    """Run a study, or its missing trials, and report the verdict.

    You can interrupt it: the same command continues where it stopped.
    """
    from tune.errors import StudyError, StudyStopped
    from tune.study.files import find

    here = "--inline" if inline else "--packed" if packed else None
    others = {"--address": address, "--slots": slots, "--packed": inline and packed}
    if here and (unfit := [option for option, given in others.items() if given]):
        raise StudyError(f"{here} trains in this process: leave out {unfit[0]}")
    limit = None if time_budget is None else seconds_of(time_budget, "--time-budget")
    found = find(config, output)
    study, output = found.study, found.output if output == STUDIES else output
    if packed and study.shown:
        raise StudyError("--packed is for the built-in models; a training of your own has one trial per process")
    if resume and not (output / study.name / "study.yaml").is_file():
        raise StudyError(f"{output / study.name}: no study was begun here; leave out --resume to begin it")
    # what trains and tracks is imported after these checks, because it takes seconds
    from analysis.io.text import one_line, redact
    from tune.backend.inline import Inline
    from tune.backend.packed import Packed
    from tune.backend.ray_backend import RayBackend
    from tune.cli.endings import LastLine, State, restart, seconds_left
    from tune.cli.screen import Screen
    from tune.run.interrupt import Interruption
    from tune.study.addresses import check_address
    from tune.tracking.check import check_store
    from tune.tracking.store import tracking_uri

    uri = tracking_uri(tracking, study.tracking, output)
    away = None if uri == "none" else check_store(uri)
    screen = Screen("" if uri == "none" else ui_command(uri), as_json)
    screen.begun(study)
    if away:
        typer.echo(
            f"MLflow at {redact(uri)} cannot be used now ({away}). The study goes on, and logs to it when it is back.",
            err=True,
        )
    left = None if limit is None else seconds_left(limit)
    last_line = LastLine()
    with Interruption(screen.say, functools.partial(_last, screen, last_line)) as interruption, last_line.watching():
        if left:
            interruption.end_after(left)
        where = check_address(address) if address else study.address
        again = restart(screen, last_line, left and time.time() + left)
        backend: Backend
        if here:
            backend = Packed(packed) if packed else Inline()
        else:
            backend = RayBackend(slots, where, warn=screen.warn, say=screen.say, again=again)
        state, code = None, int(Exit.COULD_NOT)
        try:
            ended = _run(study, found.base, output, uri, interruption, backend, screen, require_verdict)
            if ended is not None:
                state, code = State.FINISHED, ended
            elif interruption.caught is None:
                state = State.UNFINISHED
        except KeyboardInterrupt:  # no trial was running
            pass
        except (StudyStopped, OSError) as error:
            _ended(screen, State.FAILED, Exit.COULD_NOT, then, output / study.name, one_line(redact(str(error))))
            raise
    if state is None:
        screen.event("end", state=State.INTERRUPTED, exit_code=interruption.exit_code, folder=output / study.name)
        typer.echo("Interrupted. What has ended is kept; the same command continues from there.", err=True)
        sys.stdout.flush()
        os._exit(interruption.exit_code)  # all is done; the libraries' own exits take seconds
    if state is State.UNFINISHED:
        typer.echo(
            f"The time budget of {time_budget} is over. What has ended is kept; the same command continues from there.",
            err=True,
        )
    _ended(screen, state, code, then, output / study.name)
    raise typer.Exit(code)


def _ended(screen: Screen, state: State, code: int, then: str | None, folder: Path, reason: str = "") -> None:
    """Tell a program of the end of a sweep, and why if it failed, and run the user's command."""
    from tune.cli.endings import run_then

    why = {"reason": reason} if reason else {}
    screen.event("end", state=state, exit_code=int(code), folder=folder, **why)
    if then and (problem := run_then(then, folder, state, code)):
        screen.warn(problem)


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
        say=screen.say,
        watch=screen.watch,
    )
    if not run.stages.finished:
        return None
    return conclude(run, "" if uri == "none" else ui_command(uri), require_verdict, screen)


def conclude(run: StudyRun, browse: str, require_verdict: bool = False, screen: Screen | None = None) -> int:
    """Report a finished study to the user and to its tracker; return the exit code.

    Args:
        run: The closed run of the study.
        browse: Command that shows the trials; empty if they were not logged.
        require_verdict: Return `Exit.UNDECIDED` if an arm is undecided.
        screen: Display of the run, which may be for a program.
    """
    from analysis.io.text import one_line, redact
    from analysis.verdict.exits import end
    from analysis.verdict.kinds import as_object

    if run.stages.hopeless:
        reason = next(record.reason for record in run.records.values() if record.reason)
        typer.echo(f"{NOTHING_TRAINED}: {one_line(redact(reason))}", err=True)
        return Exit.COULD_NOT
    result = show_verdict(run.study, run.folder, browse, screen).result
    if owed := run.tracker.finish(as_object(result)):
        typer.echo(owed, err=True)
    return end(result, require_verdict)


def show_verdict(study: Study, folder: Path, browse: str, screen: Screen | None = None) -> Findings:
    """Write the report of a study, print its verdict and the next steps, and return its tables.

    A `screen` for a program gets the object of verdict.json instead.
    """
    from rich.console import Console

    from analysis.report.build import terminal_table
    from analysis.verdict.kinds import as_object
    from tune.cli.next_steps import next_steps

    found, page = written(study, folder)
    if screen and screen.as_json:
        screen.event("verdict", **as_object(found.result), report=page)
        return found
    Console().print(terminal_table(found.result))
    for number, step in enumerate(next_steps(found.result, study, str(page), browse), 1):
        typer.echo(f"{number}. {step}")
    return found


def written(study: Study, folder: Path) -> tuple[Findings, Path]:
    """Write the report of a study and the cards of its models; return its tables and the path of the report."""
    from analysis.io.study import load
    from analysis.report import build
    from analysis.report.findings import Findings
    from tune.run.kept.models import write_card
    from tune.run.verdicts import shown

    found = Findings(load(folder))
    shown(folder, found.result)
    page = build.write(found, folder)
    for arm in study.arms:
        write_card(study, folder, arm)
    return found, page
