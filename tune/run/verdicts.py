"""Record in the ledger which verdicts of a finished study were shown."""

from __future__ import annotations

from pathlib import Path

from analysis.verdict.kinds import Result
from tune.errors import LedgerError
from tune.run import ledger
from tune.study.files import LEDGER


def shown(folder: Path, result: Result | None = None) -> bool:
    """Append the verdict that a command shows to the ledger; return False if there is nothing to append.

    There is one event per state of the data. The price of a look does not depend on this event: a look is recorded when
    its seeds have ended (`tune.decide.confirm.looks_made`). A ledger that cannot be written, or that a sweep has, is
    left as it is.

    Args:
        folder: The study's folder.
        result: Its verdict; None: it is computed from the tables, if the ledger lacks it.
    """
    path = folder / LEDGER
    if not path.is_file():
        return False
    last = next((event["event"] for event in reversed(ledger.read(path)) if event["event"] in ("ended", "verdict")), "")
    if last != "ended":
        return False
    if result is None:
        from analysis.io.study import load
        from analysis.verdict.decide import decide

        result = decide(load(folder))
    if result.unfinished:
        return False
    try:
        held = ledger.Ledger(path)
    except (LedgerError, OSError):
        return False
    try:
        held.append(
            "verdict",
            seeds={arm: len(seeds) for arm, seeds in result.seeds.items()},
            rule=result.rule,
            level=result.level,
            correction=result.correction,
            losses=result.losses_sha256,
            verdicts={row.label: row.kind for row in result.every},
        )
    finally:
        held.close()
    return True
