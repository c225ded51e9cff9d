"""Decide whether a study folder may be continued with a changed study file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tune.errors import StudyError
from tune.run import ledger
from tune.study.files import parse
from tune.study.study import Study

EXTENDABLE = ("confirm.seeds", "confirm.max_seeds", "search.trials_per_arm")


# what may change: no result depends on it
ANY = ("tracking", "resources.stall_timeout", "address", "storage", "keep.models", "keep.checkpoints")


def check_folder(study: Study, folder: Path) -> None:
    """Refuse a folder that belongs to another configuration; more seeds or trials than before may extend a study."""
    recorded = folder / "study.yaml"
    if not recorded.exists():
        if folder.exists() and any(folder.iterdir()):
            raise StudyError(f"{folder}: is not empty and holds no study; choose another name or --output")
        return
    before = parse(recorded.read_text(encoding="utf-8"), recorded)
    if before.digest(*ANY, *EXTENDABLE) != study.digest(*ANY, *EXTENDABLE):
        changed = ", ".join(_differences(before.model_dump(), study.model_dump()))
        raise StudyError(f"{folder}: belongs to another configuration; changed: {changed}; give the study another name")
    if refused := _not_an_extension(before, study, folder):
        raise StudyError(f"{folder}: {refused}")


def _not_an_extension(before: Study, now: Study, folder: Path) -> str | None:
    """Why the numbers of seeds and trials that a study was begun with cannot be changed to these; None where they can.

    Seeds may be added after the fixed rule, and to an e-process, which is valid at any number of them. The looks of an
    O'Brien-Fleming rule and its bounds belong together, so its cap stays. Search trials may be added until the grid
    of learning rates is centred on the best of them.
    """
    cap = (before.confirm.looks[-1], now.confirm.looks[-1])
    if now.confirm.seeds < before.confirm.seeds:
        return (
            f"confirm.seeds was {before.confirm.seeds} and is now {now.confirm.seeds}; seeds can be added to a study, "
            "not taken away"
        )
    if cap[1] < cap[0]:
        return f"confirm.max_seeds was {cap[0]} and is now {cap[1]}; seeds can be added to a study, not taken away"
    if cap[1] > cap[0] and now.confirm.rule == "obrien-fleming":
        return (
            f"confirm.max_seeds was {cap[0]} and is now {cap[1]}; the bounds of obrien-fleming hold for the looks "
            "named before the first one: give the study another name"
        )
    trials = (before.search.trials_per_arm, now.search.trials_per_arm)
    if trials[1] < trials[0]:
        return f"search.trials_per_arm was {trials[0]} and is now {trials[1]}; trials can be added, not taken away"
    path = folder / "ledger.jsonl"
    if trials[1] > trials[0] and path.exists() and any(event["event"] == "grid" for event in ledger.read(path)):
        return (
            f"search.trials_per_arm was {trials[0]} and is now {trials[1]}; the learning rates were already chosen "
            "around the best of the search, and more of it would change that choice: give the study another name"
        )
    return None


def _differences(before: Any, now: Any, where: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [
            line for key in keys for line in _differences(before.get(key), now.get(key), f"{where}.{key}".strip("."))
        ]
    return [] if before == now or where in ANY else [f"{where} ({before} -> {now})"]
