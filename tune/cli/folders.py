"""The commands for folders of studies: ls and rm."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tune.cli.common import Names, Output, study_folder

if TYPE_CHECKING:
    from tune.run.standing import Standing

STUDIES = Path("studies")
OWN = re.compile(  # names in a study's folder; a scratch file starts with a dot, and a repaired ledger leaves copies
    r"\.?(study\.yaml|ledger\..*|heartbeat\.json|provenance\.json|check\.json|pretrained\.json|verdict\.(json|md)|report\.html"
    r"|(trials|curves|layers|samples)\.parquet)(\.\d+)?|figures|tables|models|logs|gates|code|checkpoints|cells|\.DS_Store"
)


def ls(
    folder: Annotated[Path | None, typer.Argument(help="Folder of studies. Default: --output.")] = None,
    output: Output = STUDIES,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the studies of a folder: state, cells that have ended, verdict in short, last change."""
    from tune.errors import StudyError
    from tune.run.standing import standings

    where = folder or output
    if not where.is_dir() and where != STUDIES:
        raise StudyError(f"{where}: no such folder")
    found = standings(where) if where.is_dir() else []
    if as_json:
        typer.echo(json.dumps([standing_object(each) for each in found], indent=1))
    elif found:
        _table(found)
    else:
        typer.echo(f"No studies in {where}. `pagating sweep STUDY.yaml` begins one.", err=True)


def standing_object(each: Standing) -> dict[str, Any]:
    """Return how a study stands as an object of JSON."""
    moment = None if each.changed is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(each.changed))
    fields = {name: value for name, value in vars(each).items() if name != "changed"}
    return {**fields, "folder": str(each.folder), "changed": moment}


def _table(found: list[Standing]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from analysis.io.text import one_line

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    for name in ("study", "state", "cells", "verdict", "last change"):
        table.add_column(name, justify="right" if name == "cells" else "left", overflow="fold")
    for each in found:
        of = f"{each.least}" if each.least == each.most else f"{each.least} to {each.most}"
        cells = f"{each.ended} of {of}" if each.most else ""
        moment = "" if each.changed is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(each.changed))
        said = one_line(each.problem or each.short or each.summary, 100)
        table.add_row(*(Text(text) for text in (each.name, each.state, cells, said, moment)))
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


def rm(
    studies: Names,
    output: Output = STUDIES,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove studies with all their trials, models and reports. Their runs in MLflow stay.

    To remove the runs too, delete the experiment of the study's name in `pagating ui`; `mlflow gc` frees their space.
    """
    from analysis.io.text import readable
    from tune.errors import StudyError
    from tune.run.ledger import Ledger
    from tune.run.standing import standing

    folders = list({folder.resolve(): folder for folder in (_to_remove(name, output) for name in studies)}.values())
    with ExitStack() as held:  # no sweep of these studies can begin meanwhile
        for folder in folders:
            if (folder / "ledger.jsonl").is_file():
                held.callback(Ledger(folder / "ledger.jsonl", strict=False).close)
        sizes = {folder: sum(map(_bytes, _parts(folder))) for folder in folders}
        for folder, size in sizes.items():
            typer.echo(f"{folder}: {standing(folder).ended} cells, {readable(size)}")
        if not yes:
            if not sys.stdin.isatty():
                raise StudyError("without a terminal nobody can be asked: give --yes")
            if not typer.confirm("Remove this for ever?"):
                typer.echo("Nothing was removed.")
                return
        for folder, size in sizes.items():
            left = _logged(folder)
            for part in _parts(folder):
                shutil.rmtree(part)
            typer.echo(f"Removed {folder}: {readable(size)} are free.{left}")


def _to_remove(name: str, output: Path) -> Path:
    """Return the folder of a study, which may be damaged.

    Raises StudyError if there is none, or if the folder contains anything that no study writes.
    """
    from tune.errors import StudyError

    for folder in (Path(name), output / name):
        if (folder / "ledger.jsonl").is_file() or (folder / "study.yaml").is_file():
            if folder.is_symlink():
                raise StudyError(f"{folder}: is a link to {folder.resolve()}; name that folder")
            _check_own(folder)
            return folder.resolve() if folder == Path() else folder
    return study_folder(name, output)


def _check_own(folder: Path) -> None:
    """Raise StudyError if a folder contains anything that no study writes, or only a study file written by hand."""
    from tune.errors import StudyError
    from tune.study.files import dump, load

    foreign = [path.name for path in sorted(folder.iterdir()) if not OWN.fullmatch(path.name)]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise StudyError(f"{folder / foreign[0]}{more}: not written by a study; move it away first")
    if not (folder / "ledger.jsonl").is_file() and not (folder / "trials.parquet").is_file():
        path = folder / "study.yaml"
        if path.read_text(encoding="utf-8") != dump(load(path)):
            raise StudyError(f"{folder}: contains a study file but no study; nothing is removed")


def _parts(folder: Path) -> list[Path]:
    """Return the folders that a study takes: its own, and that of its checkpoints if it has a storage.

    The storage of a renamed or copied folder may be that of the first one, so it is left out.
    """
    from tune.errors import StudyError
    from tune.study.files import load

    try:
        study = load(folder / "study.yaml")
    except StudyError:
        return [folder]
    stored = Path(study.storage) / study.name if study.storage and study.name == folder.name else None
    return [folder, stored] if stored and stored.is_dir() else [folder]


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _logged(folder: Path) -> str:
    """Return a sentence on the runs that stay in MLflow; "" if the study sent none."""
    if not (folder / "logs" / "tracked.json").is_file():
        return ""
    name = folder.resolve().name
    return f" Its runs in MLflow stay: to remove them, delete the experiment {name} in `pagating ui`, then `mlflow gc`."
