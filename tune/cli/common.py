"""What the commands share: the arguments that several take, and finding a study by its name."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

INTERRUPTED = 130  # 128 + SIGINT
LOOPBACK = "127.0.0.1"


def studies_in(output: Path) -> list[str]:
    """Names of the studies in a folder."""
    return sorted(path.parent.name for path in output.glob("*/study.yaml"))


def complete_study(ctx: typer.Context, incomplete: str) -> list[str]:
    """For the shell: studies whose name begins so."""
    output = Path(ctx.params.get("output") or "studies").expanduser()
    return [name for name in studies_in(output) if name.startswith(incomplete)]


def complete_config(incomplete: str) -> list[str]:
    """For the shell: study files, and folders on the way to them."""
    folder, begun = os.path.split(incomplete)
    found = []
    for path in sorted(Path(folder).glob("*")):
        if path.name.startswith(begun) and (begun.startswith(".") or not path.name.startswith(".")):
            shown = os.path.join(folder, path.name)
            found += [f"{shown}/"] if path.is_dir() else [shown] if path.suffix in (".yaml", ".yml") else []
    return found


Config = Annotated[
    Path, typer.Argument(help="The study file, such as configs/sweep.yaml.", autocompletion=complete_config)
]
Output = Annotated[Path, typer.Option(help="The folder of studies.")]
Name = Annotated[str, typer.Argument(help="Name of a study, or its folder.", autocompletion=complete_study)]
RequireVerdict = Annotated[
    bool, typer.Option("--require-verdict", help="Exit with 3 if an arm but the floor is undecided or not testable.")
]
Slots = Annotated[int | None, typer.Option(min=1, help="Trials side by side; as many as cores when not given.")]


def study_folder(name: str, output: Path) -> Path:
    """The folder of a study that is named, in `output`, or given itself. Raises StudyError where there is none."""
    from tune.errors import StudyError

    for folder in (Path(name), output / name):
        if os.path.isfile(folder / "study.yaml"):  # False also for a name that no file could have
            return folder
    near = get_close_matches(name, studies_in(output), 1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise StudyError(f"{name}: no study of that name in {output} and no folder with a study.yaml{hint}")
