"""The errors of a study, each one line that a user can act on."""

from __future__ import annotations


class StudyError(ValueError):
    """Bad input of a study: one line that names the file, the key, the value and what is allowed."""


class LedgerError(ValueError):
    """A ledger that cannot be used: one line that names the file, the line and the condition."""


class TrackingError(ValueError):
    """An MLflow store that cannot be written: one line that names it and says why."""


NODE_LOST = "its node was lost"  # begins the reason of a cell that ended with the node it ran on


SHORT_OF_MEMORY = "running low on memory"  # what Ray says when it ends a worker to keep the node alive


class StudyStopped(ValueError):
    """A study that cannot go on, such as on a full disk: one line. All that has ended is kept."""
