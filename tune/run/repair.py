"""Repair a damaged ledger. Cells that its undamaged lines fully describe are kept; the others are trained again."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from analysis.io.write import write_whole
from tune.run.ledger import Ledger, decode_event, encode_event
from tune.study.sizes import interval
from tune.study.study import Study


def repair(study: Study, folder: Path) -> str:
    """Replace `ledger.jsonl` by its undamaged lines and keep a copy of the old file; return a line on the changes.

    A cell stays ended only if all its evaluations are there. Of any other cell that ended, only the suggestion stays,
    so the next sweep trains it again, to the same bits.

    Raises:
        LedgerError: A sweep of this study is running.
    """
    path = folder / "ledger.jsonl"
    ledger = Ledger(path, strict=False)
    try:
        lines = path.read_bytes().split(b"\n")
        found = [decode_event(line) for line in lines]
        lost = [number for number, (line, event) in enumerate(zip(lines, found, strict=True), 1) if line and not event]
        if not lost:
            return f"{path}: no line is damaged; nothing was changed"
        events = [event for event in found if event]
        again = unsure(study, events)
        kept = [e for e in events if e.get("cell") not in again or (e["event"] == "suggested" and again[e["cell"]])]
        copy = next(name for name in _copies(folder) if not name.exists())
        copy.write_bytes(b"\n".join(lines))
        whole = (encode_event({name: value for name, value in event.items() if name != "crc"}) for event in kept)
        write_whole(path, b"".join(whole))
    finally:
        ledger.close()
    known = any(event["event"] == "study" for event in kept)
    which = f"line {', '.join(map(str, lost[:5]))}{', ...' if lost[5:] else ''}"
    removed = "1 damaged line" if len(lost) == 1 else f"{len(lost)} damaged lines"
    return (
        f"{path}: {removed} removed ({which}), {len(again)} cells will be trained again"
        f"{'' if known else '; the next sweep uses the corpus as it is now'}; the damaged file is kept as {copy.name}"
    )


def unsure(study: Study, events: list[dict[str, Any]]) -> dict[str, bool]:
    """Return the cells that have ended, or may have, but whose lines are incomplete.

    Returns:
        By key of such a cell, True if its suggestion is there.
    """
    mine: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if "cell" in event:
            mine.setdefault(event["cell"], []).append(event)
    found = {}
    for cell, lines in mine.items():
        suggested = any(line["event"] == "suggested" for line in lines)
        starts = [place for place, line in enumerate(lines) if line["event"] == "started"]
        attempt = lines[starts[-1] :] if starts else []
        rows = [line["row"]["step"] for line in attempt if line["event"] == "report"]
        end = next((line for line in attempt if line["event"] == "ended"), None)
        last = end["final"].get("steps", rows[-1] if rows else 0) if end else 0
        config: dict[str, float] = next((line["config"] for line in lines if line["event"] == "suggested"), {})
        every = interval(study, config)
        whole = [*range(every, last, every), *([last] if last else [])]
        if (
            not suggested
            or (end is None and any(line["event"] == "ended" for line in lines))
            or (end and rows != whole)
        ):
            found[cell] = suggested
    return found


def _copies(folder: Path) -> Any:
    return (folder / f"ledger.damaged-{number}.jsonl" for number in itertools.count(1))
