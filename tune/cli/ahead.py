"""The commands for a study that has not run yet: plan and try."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from analysis.io.exits import Exit
from pagating.hardware import UTILISATION
from tune.cli.common import Config, Output, Slots


def plan(
    config: Config,
    output: Output = Path("studies"),
    slots: Slots = None,
    hours_from: Annotated[
        str,
        typer.Option(
            help="Source of the hours: 'measure' (seconds of training here), or a device such as a100; with `trial:` "
            "the seconds of a trial, such as 90s."
        ),
    ] = "measure",
    utilisation: Annotated[float, typer.Option(help="Assumed share of the device's peak.")] = UTILISATION,
    effect: Annotated[str, typer.Option(help="Difference to detect, a percentage of the baseline's loss.")] = "0.5%",
    noise: Annotated[
        str | None, typer.Option(help="Standard deviation of paired differences: an earlier study, or a percentage.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="terminal or json.")] = "terminal",
) -> None:
    """Print the cost of a study before it runs: cells, tokens, FLOPs, hours, disk, memory, and its statistical power.

    Writes only the shared token cache.
    """
    from tune.plan.plan import run
    from tune.plan.progress import on_stderr

    with on_stderr() as progress:
        text = run(
            config,
            output,
            slots=slots,
            hours_from=hours_from,
            utilisation=utilisation,
            effect=effect,
            noise=noise,
            form=form,
            progress=progress,
        )
    typer.echo(text)


def check(
    config: Config,
    share: Annotated[
        float, typer.Option(min=0.0001, max=1.0, help="Share of the budget that each trial of the check has.")
    ] = 0.1,
    output: Output = Path("studies"),
) -> None:
    """Check in a few short trials what a verdict needs from your own training, before hours are spent.

    The same seed gives the same result, another one does not, every setting of an arm is read and has an effect, the
    budget is used up, the test metric comes in the last stage only, and no file is shared. Exits with 2 if not. The
    study's folder keeps what was found, and the report states it.
    """
    from tune.errors import StudyError
    from tune.plan.progress import on_stderr
    from tune.study.files import find
    from tune.study.own_study import OwnStudy
    from tune.subject.check import check as findings
    from tune.subject.check import most_trials

    found = find(config, output)
    if not isinstance(found.study, OwnStudy):
        raise StudyError(f"{found.study.name}: `pagating check` is for `trial:`; the built-in model is tested already")
    refused = False
    with on_stderr() as progress:
        progress.begin("trials of the check", most_trials(found.study))
        for finding in findings(found.study, found.base, share, found.output / found.study.name, progress.done):
            progress.say(str(finding), sys.stdout)
            refused |= finding.passed is False
    raise typer.Exit(Exit.BAD_INPUT if refused else Exit.DONE)


def try_(
    config: Config,
    output: Output = Path("studies"),
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps per arm, 3 by default; with `trial:` units of the budget, a tenth by default."),
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Train only this arm. Can be repeated.")] = None,
    micro_batches: Annotated[
        int | None, typer.Option(min=1, help="Most micro batches per step. Fewer are faster and need the same memory.")
    ] = None,
) -> None:
    """Train a few steps of every arm at its real size. Print loss, memory and seconds per step.

    With `trial:` a short trial of every arm runs, and its metric is printed. Writes only the shared token cache.
    """
    from tune.errors import StudyError
    from tune.plan import dry_run, own
    from tune.plan.progress import on_stderr
    from tune.study.files import find
    from tune.study.own_study import OwnStudy

    failed = False
    found = find(config, output)
    if isinstance(found.study, OwnStudy) and micro_batches:
        raise StudyError("--micro-batches is of the built-in model; your own code decides its batches: leave it out")
    with on_stderr() as progress:
        progress.begin("arms tried", len(arm or found.study.arms))
        if isinstance(found.study, OwnStudy):
            for short in own.try_arms(found.study, found.base, steps, arm or ()):
                failed |= short.problem is not None
                progress.say(short.line, sys.stdout)
                progress.done()
            raise typer.Exit(Exit.COULD_NOT if failed else Exit.DONE)
        for tried in dry_run.try_arms(found.study, found.base, found.output, steps or 3, arm or (), micro_batches):
            progress.say(dry_run.line(tried), sys.stdout)
            if not isinstance(tried, str):
                failed |= tried.problem is not None
                progress.done()
    raise typer.Exit(Exit.COULD_NOT if failed else Exit.DONE)
