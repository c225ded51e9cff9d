"""Decide if a cell whose machine failed is trained again, and if no other cell may then run beside it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection

from tune.errors import NODE_LOST, SHORT_OF_MEMORY
from tune.study.cell import Cell

ATTEMPTS = 3  # failures in a row without progress that end a cell; the last attempt runs alone
NODES_LOST = 30  # the same for lost nodes: then the cell itself may be the cause


class Retries:
    """Cells whose machine failed. A failure counts if the cell made no progress since the one before."""

    def __init__(self) -> None:
        self._waiting: deque[Cell] = deque()
        self._alone: set[str] = set()  # cells that may only run alone
        self._lost: Counter[str] = Counter()
        self._nodes_lost: Counter[str] = Counter()  # counted apart, because nodes join and leave
        self._reached: dict[str, float] = {}  # largest fraction of the budget of any attempt
        self._failed_at: dict[str, float] = {}  # the same at the last failure

    def reached(self, cell: Cell, fraction: float) -> None:
        """Record that a running cell has reached `fraction` of its budget."""
        self._reached[cell.key] = max(fraction, self._reached.get(cell.key, 0.0))

    def failed(self, cell: Cell, reason: str) -> bool:
        """Record that a cell's machine failed; return True if the cell is retried from its last checkpoint."""
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
        """Return True if no further cell may start while `running` cells run."""
        alone = any(key in self._alone for key in running)
        return alone or bool(self._waiting and running and self._waiting[0].key in self._alone)

    def take(self) -> Cell | None:
        """Return the next cell to retry, or None."""
        return self._waiting.popleft() if self._waiting else None
