"""Decide whether a cell whose machine failed is trained again, and whether it then has the machine alone."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection

from tune.errors import NODE_LOST, SHORT_OF_MEMORY
from tune.study.cell import Cell

ATTEMPTS = 3  # failures of a cell in a row without progress; the last attempt has the machine alone
NODES_LOST = 30  # lost nodes in a row without progress: the cell itself may be the cause


class Retries:
    """The cells whose machine failed. Each failure without progress since the one before counts."""

    def __init__(self) -> None:
        self._waiting: deque[Cell] = deque()
        self._alone: set[str] = set()  # cells that run with no other beside them
        self._lost: Counter[str] = Counter()
        self._nodes_lost: Counter[str] = Counter()  # nodes come and go, so they are counted apart
        self._reached: dict[str, float] = {}  # largest share of the budget in any attempt
        self._failed_at: dict[str, float] = {}  # the same at the last failure

    def reached(self, cell: Cell, fraction: float) -> None:
        """Record that a running cell is at `fraction` of its budget."""
        self._reached[cell.key] = max(fraction, self._reached.get(cell.key, 0.0))

    def failed(self, cell: Cell, reason: str) -> bool:
        """Record that a cell's machine failed; return whether the cell is tried again from its last checkpoint."""
        key, reached = cell.key, self._reached.get(cell.key, 0.0)
        node = reason.startswith(NODE_LOST)
        lost, most = (self._nodes_lost, NODES_LOST) if node else (self._lost, ATTEMPTS)
        lost[key] = 1 if reached > self._failed_at.get(key, 0.0) else lost[key] + 1
        self._failed_at[key] = reached
        if not node and (SHORT_OF_MEMORY in reason or lost[key] == ATTEMPTS - 1):
            self._alone.add(key)
        if lost[key] >= most:
            return False
        self._waiting.append(cell)
        return True

    def blocks(self, running: Collection[str]) -> bool:
        """Return whether no cell may start beside those that run."""
        alone = any(key in self._alone for key in running)
        return alone or bool(self._waiting and running and self._waiting[0].key in self._alone)

    def take(self) -> Cell | None:
        """Return the next cell to try again, or None."""
        return self._waiting.popleft() if self._waiting else None
