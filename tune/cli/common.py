"""The arguments that several commands share, their completion, and the search for a study by its name."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from analysis.io import names

INTERRUPTED = 130  # 128 + SIGINT
LOOPBACK = "127.0.0.1"
BRING_BACK = "put back a copy, such as that of the study's parent run in MLflow"
MOST_SECONDS = 86_400 * 49  # of a time budget; a timer takes no more
MOST_NAMED = 10  # studies that an error lists


def studies_in(output: Path) -> list[str]:
    """Return the names of the studies in a folder, sorted."""
    return sorted(path.parent.name for path in output.glob("*/study.yaml"))


def complete_study(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the studies whose name starts with `incomplete`, for the shell's completion."""
    output = Path(ctx.params.get("output") or "studies").expanduser()
    return [name for name in studies_in(output) if name.startswith(incomplete)]


def complete_config(incomplete: str) -> list[str]:
    """Return the study files and folders whose path starts with `incomplete`, for the shell's completion."""
    folder, begun = os.path.split(incomplete)
    found = []
    for path in sorted(Path(folder).glob("*")):
        if path.name.startswith(begun) and (begun.startswith(".") or not path.name.startswith(".")):
            shown = os.path.join(folder, path.name)
            found += [f"{shown}/"] if path.is_dir() else [shown] if path.suffix in (".yaml", ".yml") else []
    return found


STUDIES = Path(names.STUDIES)  # default of --output
Config = Annotated[
    Path,
    typer.Argument(
        help="Study file, such as configs/sweep.yaml; - for standard input; or the name of a study that has begun.",
        autocompletion=complete_config,
    ),
]
Output = Annotated[Path, typer.Option(help="Folder of the studies.")]
Name = Annotated[str, typer.Argument(help="Name of a study, or its folder.", autocompletion=complete_study)]
Names = Annotated[list[str], typer.Argument(help="Names of studies, or their folders.", autocompletion=complete_study)]
RequireVerdict = Annotated[
    bool,
    typer.Option("--require-verdict", help="Exit with 3 if an arm other than the floor is undecided or not testable."),
]
MOST_SLOTS = 4096  # far beyond what one machine can run; more is a slip of the keyboard
Slots = Annotated[
    int | None, typer.Option(min=1, max=MOST_SLOTS, help="Trials at the same time. Default: as many as cores.")
]


def seconds_of(text: str, option: str) -> float:
    """Return the seconds of a time such as 90m, 2h or 1h30m. Raises StudyError for any other text."""
    from tune.errors import StudyError

    match = re.fullmatch(r"(?:([\d.]+)d)?(?:([\d.]+)h)?(?:([\d.]+)m(?:in)?)?(?:([\d.]+)s)?", text.replace(" ", ""))
    try:
        parts = [float(part or 0) for part in match.groups()] if match else []
    except ValueError:
        parts = []
    seconds = sum(part * size for part, size in zip(parts, (86_400, 3_600, 60, 1), strict=False))
    if not 0 < seconds <= MOST_SECONDS:
        raise StudyError(f"{option} {text}: allowed: a time such as 90m, 2h, 1h30m or 2d")
    return seconds


def missing_hint(error: Any) -> str:
    """Return what to give for a missing argument, such as one of the studies; "" for another usage error."""
    name = getattr(getattr(error, "param", None), "name", None)
    if type(error).__name__ != "MissingParameter":
        return ""
    if name == "config":
        return " A study file is meant, such as configs/sweep.yaml."
    if name not in ("study", "studies"):
        return f" {getattr(error.param, 'help', None) or ''}".rstrip()
    output = Path(error.ctx.params.get("output") or STUDIES)
    found = studies_in(output)
    return f" Studies in {output}: {', '.join(found[:MOST_NAMED])}." if found else f" There are no studies in {output}."


def study_folder(name: str, output: Path) -> Path:
    """Return the folder of a study, given by name in `output` or by path. Raises StudyError if there is none."""
    from tune.errors import StudyError

    for folder in (Path(name), output / name):
        if os.path.isfile(folder / "study.yaml"):  # False also for an impossible file name
            return folder
    for folder in (Path(name), output / name):
        if os.path.isfile(folder / "ledger.jsonl"):
            raise StudyError(f"{folder}: study.yaml is missing; {BRING_BACK}")
    near = get_close_matches(name, studies_in(output), 1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise StudyError(f"{name}: no study of that name in {output} and no folder with a study.yaml{hint}")


def begun_folder(name: str, output: Path) -> Path:
    """Return the folder of a study that has a ledger. Raises StudyError if there is none."""
    from tune.errors import StudyError

    folder = study_folder(name, output)
    if not os.path.isfile(folder / "ledger.jsonl"):
        raise StudyError(f"{folder}: has no ledger.jsonl: the study was not begun, or has its tables only")
    return folder
