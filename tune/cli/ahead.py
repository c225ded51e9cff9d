"""The commands before a study runs: plan, try."""

from __future__ import annotations

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
        str, typer.Option(help="'measure' (10 s of training here), or a device such as a100.")
    ] = "measure",
    utilisation: Annotated[float, typer.Option(help="Share of a named device's peak that is assumed.")] = UTILISATION,
    effect: Annotated[str, typer.Option(help="Difference to be seen, a percentage of the baseline's loss.")] = "0.5%",
    noise: Annotated[
        str | None, typer.Option(help="An earlier study, or a percentage: sd of paired differences.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="terminal or json.")] = "terminal",
) -> None:
    """What a study will cost, before it runs: cells, tokens, FLOPs, hours, disk, memory, and the power it will have.

    Writes nothing but the shared token cache.
    """
    from tune.plan.plan import run

    text = run(
        config,
        output,
        slots=slots,
        hours_from=hours_from,
        utilisation=utilisation,
        effect=effect,
        noise=noise,
        form=form,
    )
    typer.echo(text)


def try_(
    config: Config,
    output: Output = Path("studies"),
    steps: Annotated[int, typer.Option(min=1, help="Updates of each arm.")] = 3,
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm; may be given several times.")] = None,
    micro_batches: Annotated[
        int | None, typer.Option(min=1, help="At most so many of the study's micro batches a step: as large, sooner.")
    ] = None,
) -> None:
    """Train a few steps of every arm at its real size: loss, memory, seconds a step. Writes only the token cache."""
    from tune.plan import dry_run
    from tune.study.files import load

    failed = False
    for tried in dry_run.try_arms(load(config), config.parent, output, steps, arm or (), micro_batches):
        failed |= not isinstance(tried, str) and tried.problem is not None
        typer.echo(dry_run.line(tried))
    raise typer.Exit(Exit.COULD_NOT if failed else Exit.DONE)
