"""Faults within a trial: out of memory, NaN, infinity, an error of a user's gate, and the clock stepping back."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from disturbed import STUDY, Bench, Damage, Place

from tune.run import ledger

# The gate fails once, as the file FLAG says: the trial that reads the flag removes it.
GATE = '''"""A sigmoid gate that fails when it is asked to."""

from pathlib import Path

import torch

FLAG = Path({flag!r})


def gate(x):
    mode = None
    if FLAG.exists():
        mode = FLAG.read_text()
        FLAG.unlink(missing_ok=True)
    if mode == "memory":
        torch.empty(1 << 50, dtype=torch.uint8)
    if mode == "raise":
        raise ZeroDivisionError("asked to")
    return torch.sigmoid(x) * {{"nan": float("nan"), "infinite": float("inf")}}.get(mode, 1.0)
'''
MODES = {"memory": "memory", "nan": "nan", "infinite": "step", "raise": "ZeroDivisionError"}  # word in the reason
CLOCK = '''"""The clock of every process steps back by an hour at a moment of the steady clock, which they share."""

import time

_real = time.time
time.time = lambda: _real() - 3600.0 * (time.monotonic() > {moment})
'''


def infeasible(bench: Bench, times: int) -> Damage:
    """A trial of the confirm stage out of memory, with a NaN, with an infinite loss, with an error of a user's gate."""
    damage = Damage()
    folder = bench.folder / "own-gate"
    folder.mkdir()
    flag = folder / "flag"
    (folder / "own.py").write_text(GATE.format(flag=str(flag)), encoding="utf-8")
    arms = {**STUDY["arms"], "own": {"gate": f"{folder / 'own.py'}:gate", "alpha": 0.7}}
    calm = bench.place("own-gate-undisturbed", arms=arms)
    calm.sweep()
    expected = calm.cells()
    before = sum(not key.startswith("confirm/") for key in expected)
    for mode, named in list(MODES.items())[:times]:
        place = bench.place(f"own-gate-{mode}", arms=arms)
        running = place.start()
        place.until(running, before)
        flag.write_text(mode, encoding="utf-8")
        place.wait(running)
        if flag.exists():
            raise RuntimeError(f"{mode}: no trial took the flag")
        place.sweep()  # nothing is retried
        struck = [
            r for r in ledger.records(ledger.read(place.study / "ledger.jsonl")).values() if r.outcome != "completed"
        ]
        if len(struck) != 1 or struck[0].outcome != "infeasible" or named not in str(struck[0].reason):
            raise RuntimeError(f"{mode}: {[(record.outcome, record.reason) for record in struck]}")
        damage.times += 1
        key = struck[0].cell.key
        place.compare({**expected, key: place.cells()[key]}, damage, calm.seconds)
    damage.notes.append("the trial that is struck is infeasible, once, and no other cell changes")
    return damage


def clock_back(bench: Bench, times: int) -> Damage:
    """The clock of driver and workers one hour back at a random moment."""
    damage = Damage()
    for _ in range(times):
        place: Place = bench.place("clock")
        after = bench.random.uniform(0.4, 0.8) * bench.seconds  # not before Ray runs: the ledger has no line yet
        moment = time.monotonic() + after
        (place.folder / "sitecustomize.py").write_text(CLOCK.format(moment=moment), encoding="utf-8")
        place.sweep(PYTHONPATH=f"{place.folder}:{Path(__file__).parents[1]}")
        stamps = [event["time"] for event in ledger.read(place.study / "ledger.jsonl")]
        if max(a - b for a, b in itertools.pairwise(stamps)) < 3500:
            raise RuntimeError("the clock did not step back")
        bench.compare(place, damage)
    return damage
