"""How each study of a folder stands: running or finished, its cells, its verdict in short, its last change."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from analysis.io.names import PRELIMINARY
from tune.errors import PagatingError
from tune.run import ledger
from tune.run.progress import progress_of
from tune.study.files import load


class State(StrEnum):
    """State of a folder."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "not finished"  # and no sweep runs it
    NEW = "not begun"
    TABLES = "tables only"  # a published study, which has no ledger
    DAMAGED = "damaged"
    FOREIGN = "no study"


@dataclass(frozen=True)
class Standing:
    """How a study stands.

    Attributes:
        folder: The study's folder.
        state: Its state.
        name: Name of the folder, which commands take.
        ended: Number of cells that have ended.
        least: Least number of cells of the whole study.
        most: Largest number of them.
        verdict: Verdict on each arm in question, by arm. Empty if there is none, or none of the present cells.
        summary: The verdict as a sentence.
        changed: Time of the last event, or of the newest file, seconds since 1970.
        problem: Reason why the folder is damaged or no study.
    """

    folder: Path
    state: State
    name: str
    ended: int = 0
    least: int = 0
    most: int = 0
    verdict: dict[str, str] = field(default_factory=dict)
    summary: str = ""
    changed: float | None = None
    problem: str = ""

    @property
    def short(self) -> str:
        """Number of arms with each verdict, as text, and whether the seeds are too few for a claim."""
        counts = Counter(kind.replace("_", " ") for kind in self.verdict.values())
        text = ", ".join(f"{number} {kind}" for kind, number in counts.items())
        return f"{text} ({PRELIMINARY.lower()})" if text and PRELIMINARY in self.summary else text


def standing(folder: Path) -> Standing:
    """Read how the study of a folder stands. Nothing is locked or written, and nothing that the folder has raises."""
    name = folder.resolve().name
    try:
        changed = max((file.stat().st_mtime for file in folder.iterdir() if file.is_file()), default=None)
        if not (folder / "study.yaml").exists():
            lost = (folder / "ledger.jsonl").exists()
            problem = "study.yaml is missing" if lost else "no study.yaml and no ledger"
            return Standing(folder, State.DAMAGED if lost else State.FOREIGN, name, changed=changed, problem=problem)
        study = load(folder / "study.yaml")
        if not (folder / "ledger.jsonl").exists():
            tables = (folder / "trials.parquet").exists()
            state = State.TABLES if tables else State.NEW
            verdict, summary = verdict_of(folder, 0.0)
            return Standing(folder, state, name, verdict=verdict, summary=summary, changed=changed)
        progress = progress_of(study, ledger.read(folder / "ledger.jsonl"))
        held = ledger.is_held(folder / "ledger.jsonl")
        over = progress.finished or concluded_after(folder, progress.last)
    except PagatingError as error:
        return Standing(folder, State.DAMAGED, name, problem=str(error).removeprefix(f"{folder}/"))
    except (OSError, KeyError, TypeError, AttributeError) as error:  # an event whose checksum fits may lack a field
        return Standing(folder, State.DAMAGED, name, problem=f"{type(error).__name__}: {error}")
    least, most = (sum(int(progress.planned(stage)[which]) for stage in study.stages) for which in (0, 2))
    state = State.RUNNING if held else State.FINISHED if over else State.STOPPED
    verdict, summary = verdict_of(folder, progress.last) if over else ({}, "")
    ended, last = progress.ended, progress.last or changed
    return Standing(folder, state, name, ended, least, most, verdict, summary, last)


def concluded_after(folder: Path, last: float | None) -> bool:
    """Return True if a verdict is newer than the last event, that is, if a sequential rule stopped before its cap.

    The verdict.json of a report on an unfinished study is no verdict.
    """
    verdict = folder / "verdict.json"
    if last is None or not verdict.is_file() or verdict.stat().st_mtime < last:
        return False
    try:
        return not json.loads(verdict.read_text(encoding="utf-8"))["unfinished"]
    except (ValueError, KeyError, TypeError):
        return True  # damaged, or older than that key


def verdict_of(folder: Path, last: float | None) -> tuple[dict[str, str], str]:
    """Return the verdict on each arm in question and the summary of verdict.json; empty if it is older than `last`."""
    if not concluded_after(folder, last):
        return {}, ""
    try:
        found = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
        rows = {str(row["arm"]): str(row["kind"]) for row in found["comparisons"]}
        between = {f"{row['arm']} against {row['baseline']}": str(row["kind"]) for row in found.get("contrasts", [])}
        asked = {arm: kind for arm, kind in rows.items() if arm != found["floor"]} | between
        return asked or rows, str(found["summary"])
    except (ValueError, KeyError, TypeError):
        return {}, f"verdict.json is damaged; `pagating report {folder.name}` writes it again"


def standings(folder: Path) -> list[Standing]:
    """Return the standing of each folder in `folder`, sorted by name; of `folder` itself if it is a study."""
    if (folder / "study.yaml").exists():
        return [standing(folder)]
    return [standing(each) for each in sorted(folder.iterdir()) if each.is_dir() and not each.name.startswith(".")]
