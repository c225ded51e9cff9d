"""Decide whether a study folder may be continued with a changed study file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tune.errors import StudyError
from tune.run import ledger
from tune.study.files import parse
from tune.study.own_gates import with_moved_gates
from tune.study.study import Study

EXTENDABLE = ("confirm.seeds", "confirm.max_seeds", "search.trials_per_arm")
# keys that may change freely, because no result depends on them
ANY = (
    "question",
    "tracking",
    "resources.stall_timeout",
    "address",
    "storage",
    "keep.models",
    "keep.checkpoints",
    "model.preset",  # a name for sizes, which are compared
)
# places of inputs, which `Inputs.check_begun` compares by their digests
PLACES = ("corpus.source", "corpus.hub", "corpus.files", "tokenizer", "model.pretrained")


def check_folder(study: Study, folder: Path, base: Path = Path()) -> None:
    """Raise StudyError if the folder belongs to another configuration.

    More seeds or trials than before are allowed, and other places of inputs with the same bytes.

    Args:
        study: The study.
        folder: Its folder.
        base: Folder of the study file, for own gates.
    """
    recorded = folder / "study.yaml"
    if not recorded.exists():
        if folder.exists() and any(folder.iterdir()):
            raise StudyError(f"{folder}: is not empty and contains no study; choose another name or --output")
        return
    before = with_moved_gates(parse(recorded.read_text(encoding="utf-8"), recorded), folder, study, base)
    free = (*ANY, *PLACES)
    if before.digest(*free, *EXTENDABLE) != study.digest(*free, *EXTENDABLE):
        changed = ", ".join(_differences(before.model_dump(), study.model_dump()))
        raise StudyError(f"{folder}: belongs to another configuration; changed: {changed}; give the study another name")
    if refused := _not_an_extension(before, study, folder):
        raise StudyError(f"{folder}: {refused}")


def _not_an_extension(before: Study, now: Study, folder: Path) -> str | None:
    """Return the reason why a study cannot change its numbers of seeds and trials, or None if it can.

    The fixed rule allows more seeds. An e-process does too, because it is valid at any number of seeds. The bounds of
    an O'Brien-Fleming rule belong to its looks, so its cap cannot change. Search trials may be added until the grid of
    learning rates is centred on the best of them.
    """
    cap = (before.confirm.looks[-1], now.confirm.looks[-1])
    if now.confirm.seeds < before.confirm.seeds:
        return (
            f"confirm.seeds was {before.confirm.seeds} and is now {now.confirm.seeds}; seeds can be added to a study, "
            "not removed"
        )
    if cap[1] < cap[0]:
        return f"confirm.max_seeds was {cap[0]} and is now {cap[1]}; seeds can be added to a study, not removed"
    if cap[1] > cap[0] and now.confirm.rule == "obrien-fleming":
        return (
            f"confirm.max_seeds was {cap[0]} and is now {cap[1]}; the bounds of obrien-fleming hold only for the looks "
            "that were set before the first one: give the study another name"
        )
    trials = (before.search.trials_per_arm, now.search.trials_per_arm)
    if trials[1] < trials[0]:
        return f"search.trials_per_arm was {trials[0]} and is now {trials[1]}; trials can be added, not removed"
    path = folder / "ledger.jsonl"
    if trials[1] > trials[0] and path.exists() and any(event["event"] == "grid" for event in ledger.read(path)):
        return (
            f"search.trials_per_arm was {trials[0]} and is now {trials[1]}; the learning rates were already chosen "
            "around the best trials, and more trials would change that choice: give the study another name"
        )
    return None


def _differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Return a line for each value that differs between two nested dicts, except those under `ANY`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [
            line for key in keys for line in _differences(before.get(key), now.get(key), f"{where}.{key}".strip("."))
        ]
    return [] if before == now or where.startswith((*ANY, *PLACES)) else [f"{where} ({before} -> {now})"]
