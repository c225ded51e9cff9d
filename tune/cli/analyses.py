"""The commands that decide on tables: each one passes its arguments to a script of `analysis`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import typer
from typer.core import TyperCommand

# name, module with the script's `main`, first line of its help
ANALYSES: list[tuple[str, str, str]] = [
    (
        "significance",
        "analysis.verdict.decide",
        "Decide every arm against the baseline, with p adjusted for the number of arms.",
    ),
    (
        "improvement",
        "analysis.describe.improvement",
        "Measure the improvement in percent, nats, perplexity and bits per byte, at equal learning rate and over "
        "training.",
    ),
    (
        "growth",
        "analysis.describe.growth",
        "Test if the difference grows with training, by its slope against tokens.",
    ),
    (
        "ladder",
        "analysis.describe.ladder",
        "Test if an improvement lasts as models grow: the verdict on each size, and the trend over them.",
    ),
    (
        "budget",
        "analysis.describe.budget",
        "Estimate what a search budget buys: the expected best loss of n trials per arm.",
    ),
    (
        "alphas",
        "analysis.describe.alphas",
        "Tabulate where learned gate strengths start and end, by arm and layer.",
    ),
    (
        "freeze",
        "analysis.published.freeze",
        "Write the study file that tests learned alphas from scratch.",
    ),
    (
        "claims",
        "analysis.published.claims",
        "Judge each published claim by its own numbers, and set beside it what our studies say.",
    ),
]


class Forwarded(TyperCommand):
    """Command that leaves all its arguments to another parser, `--help` too."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Keep the arguments as they are."""
        ctx.args = list(args)
        return []


def train_module(words: Sequence[str]) -> str:
    """Return the module that trains the trial among the arguments: of the built-in model, or of the user's own code."""
    for word in words:
        with suppress(OSError, ValueError):
            if "test_metric" in json.loads(Path(word).read_text(encoding="utf-8")):
                return "tune.subject.own_train"
    return "pagating.train"


def forwarded(name: str, module: str | Callable[[Sequence[str]], str], text: str) -> Callable[[typer.Context], None]:
    """Return the function of a command that runs a script of `analysis`.

    Args:
        name: Name of the command.
        module: Module with the script's `main(argv, prog)`, or the function that returns it from the arguments. It is
            imported when the command runs.
        text: First line of the command's help.
    """

    def run(ctx: typer.Context) -> None:
        code = import_module(module if isinstance(module, str) else module(ctx.args)).main(ctx.args, f"pagating {name}")
        if name in ("significance", "improvement", "ladder"):  # they show verdicts
            from analysis.io.study import located
            from tune.run.verdicts import shown

            for folder in (Path(located(argument.removeprefix("--study="))) for argument in ctx.args):
                if os.path.isfile(folder / "ledger.jsonl"):  # False also for an impossible file name
                    shown(folder)
        raise typer.Exit(code)

    run.__doc__ = text
    return run
